"""What was trained and its base answer from one model, and the base's answer is the base's to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.exported import CPU, fine_tune, prove_here
from helpers.runs import PARITY
from llava_accel.data.conversation import Turn
from llava_accel.inference.beside import as_base, why_no_base
from llava_accel.inference.dialogue import Dialogue
from llava_accel.inference.origin import Loaded, Trained, find_trained, load_trained

ONE = str(PARITY / "images" / "t0.png")
QUESTION = [Turn("user", "<image>\nWhat is it?")]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "projector": {"train": "projector"},
    "lora_projector": {"lora": {"projector": True}, "train_projector": False},
    "biases": {"lora": {"bias": "lora_only"}},
    "dora": {"lora": {"variant": "dora"}},
    "vision": {"train_vision": True},
    "pissa": {"lora": {"variant": "pissa"}},
    "full": {"train": "full"},
}


@pytest.fixture(scope="module")
def runs(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with pytest.MonkeyPatch.context() as patched:
        prove_here(patched)
        folder, optim = tmp_path_factory.mktemp("runs"), {"learning_rate": 0.05}
        return {
            name: fine_tune(folder / name, model={"base": str(llava_folder)} | model, optim=optim)
            for name, model in KINDS.items()
        }


def hidden(loaded: Loaded, trained: Trained) -> tuple[str, torch.Tensor]:
    """An answer, and the logits before its last token, which show more of the weights than words do."""
    seen: list[torch.Tensor] = []
    hook = loaded.objective.llava.lm_head.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    reply = Dialogue(loaded, trained.recipe, 4).reply(QUESTION, [ONE])
    hook.remove()
    return reply.text, seen[-1]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in ("lora", "projector", "lora_projector", "dora")),
     ("biases", torch.bfloat16), ("vision", torch.bfloat16)],
)  # fmt: skip
def test_the_base_beside_is_the_base_alone(
    kind: str, dtype: torch.dtype, runs: dict[str, Path], llava_folder: Path
) -> None:
    trained = find_trained(str(runs[kind]))
    loaded = load_trained(trained, dtype=dtype, device=CPU, keep_base=True)
    assert why_no_base(trained, loaded) == ""
    own = hidden(load_trained(trained, dtype=dtype, device=CPU), trained)
    base = find_trained(base=str(llava_folder))
    alone = hidden(load_trained(base, dtype=dtype, device=CPU), base)

    before = hidden(loaded, trained)
    with as_base(loaded):
        beside = hidden(loaded, trained)
    after = hidden(loaded, trained)
    assert beside[0] == alone[0] and torch.equal(beside[1], alone[1])
    for each in (before, after):
        assert each[0] == own[0] and torch.equal(each[1], own[1])
    assert not torch.equal(own[1], alone[1])


def test_an_error_in_the_block_brings_the_trained_weights_back(runs: dict[str, Path]) -> None:
    trained = find_trained(str(runs["projector"]))
    loaded = load_trained(trained, dtype=torch.float32, device=CPU, keep_base=True)
    before = hidden(loaded, trained)[1]
    with pytest.raises(RuntimeError, match="gone"), as_base(loaded):
        raise RuntimeError("gone")
    assert torch.equal(hidden(loaded, trained)[1], before)


@pytest.mark.parametrize(("kind", "why"), [("pissa", "pissa has changed"), ("full", "a whole model has no base in it")])
def test_a_base_that_is_not_there_is_said_to_be_missing(kind: str, why: str, runs: dict[str, Path]) -> None:
    trained = find_trained(str(runs[kind]))
    loaded = load_trained(trained, dtype=torch.float32, device=CPU, keep_base=True)
    assert why_no_base(trained, loaded).startswith(why)


def test_blind_is_what_the_words_alone_say(runs: dict[str, Path]) -> None:
    """Whatever the image is: it takes the same places."""
    trained = find_trained(str(runs["lora"]))
    dialogue = Dialogue(load_trained(trained, dtype=torch.float32, device=CPU), trained.recipe, 8)
    images = [ONE, str(PARITY / "images" / "t3.png")]
    assert len({dialogue.reply(QUESTION, [image], blind=True) for image in images}) == 1
    seen = {dialogue.reply(QUESTION, [image]).text for image in images}
    assert dialogue.reply(QUESTION, images[:1], blind=True).text not in seen
    assert len({dialogue.reply(QUESTION, [image], blind=b).num_asked for image in images for b in (True, False)}) == 1
