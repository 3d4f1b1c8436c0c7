"""An export that is not what was trained is found out when it is saved, and says so."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_accel.train as verb
from helpers.exported import CPU, prove_here
from helpers.runs import PARITY, recipe, write_records
from llava_accel.console.output import Console
from llava_accel.inference.origin import find_trained, load_trained
from llava_accel.release import verification as verify
from llava_accel.release.verification import Reference, check_agreement, plain_outputs, probe_example, take_reference

pytestmark = pytest.mark.slow

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)


@pytest.fixture(scope="module")
def reference(lora_run: Path) -> Reference:
    loaded = load_trained(find_trained(str(lora_run / "export")), dtype=torch.float32, device=CPU)
    example, pixels = probe_example(loaded.processing)
    return take_reference(loaded.objective, [example], pixels, tuple(pixels["probe"].shape), CPU)


def changed(source: Path, folder: Path, change: Any) -> Path:
    """A copy of an export whose adapter is another one."""
    shutil.copytree(source, folder)
    save_file(change(load_file(source / ADAPTER)), folder / ADAPTER, metadata={"format": "pt"})
    return folder


def test_an_export_is_what_was_trained(reference: Reference, lora_run: Path, llava_folder: Path, here: None) -> None:
    found = plain_outputs(reference, lora_run / "export", dtype=torch.float32, base=str(llava_folder), use_gpu=False)
    assert check_agreement(reference, found, "export", torch.float32, Console(False)).difference < 1e-5
    assert found["answers"] == reference.answers and len(reference.answers[0]) > 0


def test_keys_that_nothing_has_a_place_for_are_counted(
    reference: Reference, lora_run: Path, llava_folder: Path, tmp_path: Path, here: None
) -> None:
    def older(adapter: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("model.language_model.", "elsewhere."): tensor for name, tensor in adapter.items()}

    folder = changed(lora_run / "export", tmp_path / "older", older)
    with pytest.warns(UserWarning, match="missing"), pytest.raises(ValueError, match=r"load 0 of \d+ weights"):
        plain_outputs(reference, folder, dtype=torch.float32, base=str(llava_folder), use_gpu=False)


def test_other_weights_under_the_right_names_are_found_out(
    reference: Reference, lora_run: Path, llava_folder: Path, tmp_path: Path, here: None
) -> None:
    folder = changed(lora_run / "export", tmp_path / "scaled", lambda all_: {n: 1.5 * t for n, t in all_.items()})
    found = plain_outputs(reference, folder, dtype=torch.float32, base=str(llava_folder), use_gpu=False)
    with pytest.raises(ValueError, match="does not compute what was trained"):
        check_agreement(reference, found, "export", torch.float32, Console(False))


def test_what_another_process_cannot_load_is_said_with_its_reason(reference: Reference, lora_run: Path) -> None:
    with pytest.raises(ValueError, match=r"transformers and peft cannot load it: [^$]*no-base"):
        plain_outputs(reference, lora_run / "export", dtype=torch.float32, base="./no-base", use_gpu=False)


def test_vllm_finds_a_place_for_every_key_of_the_adapter(lora_run: Path) -> None:
    # vLLM strips peft's prefix and maps what is left with the table of its LLaVA class; the layers of its language
    # model are under language_model.model.
    prefix, table = "base_model.model.", {"model.language_model.": "language_model.model."}
    for name in load_file(lora_run / "export" / ADAPTER):
        inner = name.removeprefix(prefix)
        (start,) = (start for start in table if inner.startswith(start))
        path = table[start] + inner.removeprefix(start)
        assert path.startswith("language_model.model.layers.") and path.endswith((".lora_A.weight", ".lora_B.weight"))


def test_a_run_on_a_base_that_transformers_cannot_load_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.train(recipe(tmp_path, train={"max_steps": 1}, checkpoint={"verify": True}))
    assert "not verified in a process with transformers and peft alone" in capsys.readouterr().out


def test_a_run_whose_export_is_not_what_was_trained_ends_with_an_error(
    llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    data = write_records(tmp_path / "data.json", [_record(number) for number in range(4)])
    settings = recipe(
        tmp_path,
        data,
        model={"base": str(llava_folder), "vision_tower": "", "adapter": "", "template": "v1"},
        data={"images": str(PARITY / "images")},
        train={"max_steps": 1},
        checkpoint={"verify": True},
    )
    verb.train(settings)

    def other(reference: Reference, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = plain_outputs(reference, *args, **kwargs)
        return found | {"logits": found["logits"] + 1.0}

    monkeypatch.setattr(verify, "plain_outputs", other)
    with pytest.raises(ValueError, match="does not compute what was trained"):
        verb.train(settings.model_copy(update={"run": settings.run.model_copy(update={"resume": "never"})}))


def _record(number: int) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"a {number}"}]
    return {"id": str(number), "image": f"t{number}.png", "conversations": turns}
