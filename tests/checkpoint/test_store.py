"""What is kept of a run, and that no checkpoint is taken for what it is not."""

import errno
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import llava_accel.train as verb
from helpers.interrupted import STEPS, assert_same_run, checkpoints, full_disk, settings, train, train_until
from helpers.runs import Tables, metrics, trained
from llava_accel.checkpoint import store as checkpoint
from llava_accel.loop.meter import Meter
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.objective import Objective
from llava_accel.model.save import is_saved
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.setup.state import TrainState
from llava_accel.storage import atomic

pytestmark = pytest.mark.slow


def test_keep_is_the_number_of_newest_checkpoints(whole: Path) -> None:
    assert checkpoints(whole) == ["step-000006", "step-000008"]


def test_every_checkpoint_can_be_used_as_it_is(whole: Path) -> None:
    usable = {path.name for path in (whole / "export").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= usable
    for folder in ("checkpoints/step-000006", "best"):
        assert usable <= {path.name for path in (whole / folder).iterdir()}


def _damage(folder: Path) -> None:
    """Flip one bit of the weights."""
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_tampered_checkpoint_that_the_recipe_names_is_refused(data: Path, whole: Path, tmp_path: Path) -> None:
    named = shutil.copytree(whole / "checkpoints" / "step-000006", tmp_path / "step-000006")
    _damage(named)
    with pytest.raises(ValueError, match=r"run\.resume: .*step-000006 is not a complete checkpoint"):
        train(settings(tmp_path, data, run={"resume": str(named)}))


def test_a_folder_without_a_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.resume: .* is not a complete checkpoint"):
        train(settings(tmp_path, data, run={"resume": str(data)}))


def test_a_damaged_newest_checkpoint_is_passed_over(data: Path, whole: Path, tmp_path: Path) -> None:
    run = train_until(settings(tmp_path, data), 7)
    _damage(run / "checkpoints" / checkpoints(run)[-1])
    assert_same_run(train(settings(tmp_path, data)), whole)


@pytest.fixture(scope="module")
def worsening(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose evaluation gets worse and worse, so that patience ends it."""
    return train(_worsening(tmp_path_factory.mktemp("worsening"), data))


def _worsening(folder: Path, data: Path, **train_table: object) -> Tables:
    return settings(
        folder,
        data,
        optim={"learning_rate": 0.5, "projector_learning_rate": 0.5, "schedule": "constant", "warmup_fraction": 0.0},
        eval={"every": 1, "patience": 2, "at_start": False, "limit": 2, "max_new_tokens": 1, "blind_limit": 0},
        checkpoint={"keep": 1},
        train={"per_device_batch_size": 2, "accumulation_steps": 2, "max_steps": 2 * STEPS, **train_table},
    )


def test_the_best_checkpoint_is_kept(data: Path, worsening: Path, tmp_path: Path) -> None:
    evaluated = {line["step"]: line["eval"]["loss"] for line in metrics(worsening) if "eval" in line}
    best = min(evaluated, key=evaluated.__getitem__)
    assert best < max(evaluated), "the test needs a run whose last checkpoint is not its best"
    assert checkpoints(worsening) == [f"step-{max(evaluated):06d}"]
    # With a constant rate a run of that many steps ends at the same weights.
    short = train(_worsening(tmp_path, data, max_steps=best))
    expected, kept = trained(short / "export"), trained(worsening / "best")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_patience_ends_a_run_and_it_stays_ended(data: Path, worsening: Path) -> None:
    evaluated = [line["eval"]["loss"] for line in metrics(worsening) if "eval" in line]
    assert evaluated.index(min(evaluated)) == len(evaluated) - 3, "two evaluations without gain"
    before = (worsening / "metrics.jsonl").read_text()
    state = verb.train(make_recipe(_worsening(worsening.parent, data)))
    assert state.step == len(evaluated) < state.num_steps
    assert (worsening / "metrics.jsonl").read_text() == before


def test_more_patience_lets_a_stopped_run_go_on(data: Path, worsening: Path, tmp_path: Path) -> None:
    shutil.copytree(worsening, tmp_path / "run")
    stopped = metrics(worsening)[-1]["step"]
    recipe = _worsening(tmp_path, data, max_steps=stopped + 1)
    recipe["eval"]["patience"] = 10
    assert verb.train(make_recipe(recipe)).step == stopped + 1


@pytest.mark.parametrize("limit", [300, 20_000], ids=["the first file", "the weights"])
def test_a_full_disk_costs_an_interval_and_nothing_else(
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: int,
) -> None:
    save, seen = checkpoint.Checkpoints.save, []

    def full_at_four(self: checkpoint.Checkpoints, *arguments: Any) -> bool:
        with full_disk(limit) if self._state.step == 4 else nullcontext():
            saved = save(self, *arguments)
        seen.append((self._state.step, saved, checkpoints(tmp_path / "run")))
        return saved

    monkeypatch.setattr(checkpoint.Checkpoints, "save", full_at_four)
    run = train(settings(tmp_path, data))
    assert (4, False, ["step-000002", "step-000003"]) in seen, (
        "the older ones are alive, and nothing unfinished is left"
    )
    said = _unwrapped(capsys.readouterr().out)
    assert re.search(r"step-000004 could not be written \(.*File too large.*\)\. The run goes on", said)
    assert checkpoints(run) == checkpoints(whole)
    assert_same_run(run, whole)


def test_lines_that_a_full_disk_keeps_back_are_written_later(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, write = Meter.log, Path.open

    def half(self: Path, mode: str = "r", **named: Any) -> Any:
        if self.name == "metrics.jsonl" and mode.startswith("a"):
            with write(self, mode) as file:
                file.write(b'{"step": 9')
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, mode, **named)

    def full_at_two_and_three(self: Meter, state: TrainState, *arguments: Any) -> None:
        with patch.object(Path, "open", half) if state.step in (2, 3) else nullcontext():
            log(self, state, *arguments)

    with patch.object(Meter, "log", full_at_two_and_three):
        run = train(settings(tmp_path, data))
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert_same_run(run, whole)


def test_a_folder_that_cannot_be_written_keeps_the_run_alive_to_its_end(data: Path, tmp_path: Path) -> None:
    train_until(settings(tmp_path, data), 1)
    (tmp_path / "run" / "checkpoints").write_text("no folder")
    with pytest.raises(ValueError, match=r"run\.output_dir: .* has no checkpoint of step 8"):
        train(settings(tmp_path, data))
    assert metrics(tmp_path / "run")[-1]["step"] == STEPS


def test_what_the_disk_does_not_give_back_is_no_checkpoint(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flush = atomic._flush_folder

    def losing_a_bit(folder: Path) -> None:
        if re.fullmatch(r"step-000002\.\w+\.tmp", folder.name):
            _damage(folder)
        flush(folder)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_flush_folder", losing_a_bit)
        run = train_until(settings(tmp_path, data), 2)
    assert checkpoints(run) == []
    assert "does not give back what was written" in _unwrapped(capsys.readouterr().out)
    assert_same_run(train(settings(tmp_path, data)), whole)


def _unwrapped(text: str) -> str:
    return " ".join(text.split())


def _stored_bytes(objective: Objective, recipe: Recipe) -> int:
    """What of an objective goes into a checkpoint: what is saved of it, and two moments of what is trained."""
    keep = is_saved(objective, recipe)
    parameters = list(objective.named_parameters())
    saved = sum(parameter.nbytes for name, parameter in parameters if keep(name))
    return saved + 2 * sum(parameter.nbytes for _, parameter in parameters if parameter.requires_grad)


def test_a_checkpoint_of_llava_1_5_7b_holds_the_trained_weights_and_their_moments(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "run": {"name": "size"},
            "model": {"base": "llava-hf/llava-1.5-7b-hf", "lora": {"rank": 128, "alpha": 256}},
            "data": {"train": "data.json"},
        }
    )
    text = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32064
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision))
        objective = Objective(prepare_trainable(model, recipe), 32000)
    attention, mlp, rank = 4 * (4096 + 4096), 3 * (4096 + 11008), 128
    lora = 32 * rank * (attention + mlp)
    projector = (1024 * 4096 + 4096) + (4096 * 4096 + 4096)
    assert _stored_bytes(objective, recipe) == 3 * 4 * (lora + projector)
    assert 4.0e9 < _stored_bytes(objective, recipe) < 4.2e9, "the frozen base alone has 13.5e9"


def test_a_checkpoint_is_as_large_as_its_shapes_say(data: Path, whole: Path, tmp_path: Path) -> None:
    folder = whole / "checkpoints" / "step-000008"
    weights = sum(tensor.nbytes for tensor in trained(folder).values())
    moments = sum(path.stat().st_size for path in (folder / "engine").glob("*.safetensors"))
    assert 2 * weights < moments < 2.2 * weights + 20_000, "two moments, the names, and the steps"
    others = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert not [path.name for path in others if path.stat().st_size > 2**20], "nothing of the base"
