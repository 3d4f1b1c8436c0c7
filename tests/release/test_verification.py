"""An export that is not what was trained is found out when it is saved, and says so."""

import gc
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from llava_accel.loop import finish
from llava_accel.recipe import Recipe
from llava_accel.release import plain_inference
from llava_accel.release import verification as verify
from llava_accel.release.other_process import other_process
from llava_accel.release.second_copy import Place
from llava_accel.release.verification import Reference, check_agreement, plain_outputs, probe_example, take_reference
from llava_accel.runtime.signals import Interruption

pytestmark = pytest.mark.slow

ADAPTER = "adapter_model.safetensors"
HERE = Place("cpu", torch.float32, 0, 0, 0.0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)


@pytest.fixture(scope="module")
def reference(lora_run: Path) -> Reference:
    loaded = load_trained(find_trained(str(lora_run / "export")), dtype=torch.float32, device=CPU)
    example, pixels = probe_example(loaded.processing)
    return take_reference(loaded.objective, [example], pixels, tuple(next(iter(pixels.values())).shape[1:]), CPU)


def changed(source: Path, folder: Path, change: Any) -> Path:
    """A copy of an export whose adapter is another one."""
    shutil.copytree(source, folder)
    save_file(change(load_file(source / ADAPTER)), folder / ADAPTER, metadata={"format": "pt"})
    return folder


def test_an_export_is_what_was_trained_as_another_process_finds(
    reference: Reference, lora_run: Path, llava_folder: Path
) -> None:
    found = plain_outputs(reference, lora_run / "export", HERE, base=str(llava_folder))
    assert found is not None
    assert check_agreement(reference, found, "export", torch.float32, Console(False)).difference < 1e-5
    assert found["answers"] == reference.answers and len(reference.answers[0]) > 0


def test_keys_that_nothing_has_a_place_for_are_counted(
    reference: Reference, lora_run: Path, llava_folder: Path, tmp_path: Path, here: None
) -> None:
    def older(adapter: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("model.language_model.", "elsewhere."): tensor for name, tensor in adapter.items()}

    folder = changed(lora_run / "export", tmp_path / "older", older)
    with pytest.warns(UserWarning, match="missing"), pytest.raises(ValueError, match=r"load 0 of \d+ weights"):
        plain_outputs(reference, folder, HERE, base=str(llava_folder))


def test_other_weights_under_the_right_names_are_found_out(
    reference: Reference, lora_run: Path, llava_folder: Path, tmp_path: Path, here: None
) -> None:
    folder = changed(lora_run / "export", tmp_path / "scaled", lambda all_: {n: 1.5 * t for n, t in all_.items()})
    found = plain_outputs(reference, folder, HERE, base=str(llava_folder))
    assert found is not None
    with pytest.raises(ValueError, match="does not compute what was trained"):
        check_agreement(reference, found, "export", torch.float32, Console(False))


def test_what_another_process_cannot_load_is_said_with_its_reason(reference: Reference, lora_run: Path) -> None:
    with pytest.raises(ValueError, match=r"transformers and peft cannot load it: [^$]*no-base"):
        plain_outputs(reference, lora_run / "export", HERE, base="./no-base")


def test_a_run_on_a_base_that_transformers_cannot_load_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb.train(recipe(tmp_path, train={"max_steps": 1}, checkpoint={"verify": True}))
    assert "not verified in a process with transformers and peft alone" in capsys.readouterr().out


@pytest.fixture
def two_steps(llava_folder: Path, tmp_path: Path) -> Recipe:
    """A run that verifies its export."""
    data = write_records(tmp_path / "data.json", [_record(number) for number in range(4)])
    model = {"base": str(llava_folder), "vision_tower": "", "adapter": "", "template": "v1"}
    images = {"images": str(PARITY / "images")}
    return recipe(tmp_path, data, model=model, data=images, train={"max_steps": 2}, checkpoint={"verify": True})


def test_a_run_whose_export_is_not_what_was_trained_ends_with_an_error(
    two_steps: Recipe, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    def other(reference: Reference, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = plain_outputs(reference, *args, **kwargs)
        assert found is not None
        return found | {"logits": found["logits"] + 1.0}

    monkeypatch.setattr(verify, "plain_outputs", other)
    with pytest.raises(ValueError, match="does not compute what was trained"):
        verb.train(two_steps)


def test_ctrl_c_leaves_the_verification_out_and_keeps_the_run(
    two_steps: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = "import sys, time; sys.stderr.write('started'); sys.stderr.flush(); time.sleep(600)"
    program, interruption = Path(two_steps.run.output_dir).parent / "waits.py", Interruption()
    program.write_text(waits)
    monkeypatch.setattr(plain_inference, "__file__", str(program))
    compute = verify.computed

    def interrupted(job: Path, process: subprocess.Popen[str], is_asked: Callable[[], bool]) -> Any:
        threading.Timer(1.0, lambda: interruption._note(signal.SIGINT, None)).start()
        return compute(job, process, is_asked)

    monkeypatch.setattr(verify, "computed", interrupted)
    since = time.monotonic()
    state = verb.train(two_steps, interruption)
    assert time.monotonic() - since < 60
    said, run = capsys.readouterr().out, Path(two_steps.run.output_dir)
    assert "not verified, as this run was asked to end. It is complete" in said and "next: llava-accel chat" in said
    assert state.step == 2 and (run / "report.html").is_file() and (run / "export" / ADAPTER).is_file()


def test_the_other_process_starts_before_the_last_answers_are_made(
    two_steps: Recipe, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    events: list[str] = []

    @contextmanager
    def watched() -> Iterator[subprocess.Popen[str]]:
        events.append("started")
        with subprocess.Popen([sys.executable, "-c", ""], text=True) as process:
            yield process
        events.append("ended")

    def noted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (events.append(name), work(*args))[1]

    monkeypatch.setattr(verify, "other_process", watched)
    monkeypatch.setattr(finish, "score_training", noted("answers", finish.score_training))
    monkeypatch.setattr(verify, "computed", noted("job", lambda *_: None))
    verb.train(two_steps.model_copy(update={"eval": two_steps.eval.model_copy(update={"train_limit": 1})}))
    assert events == ["started", "answers", "job", "ended"]
    verb.train(two_steps.model_copy(update={"checkpoint": two_steps.checkpoint.model_copy(update={"verify": False})}))
    assert events[4:] == []


def test_the_other_process_ends_without_a_job_and_with_the_block() -> None:
    with other_process() as waiting:
        waiting.communicate("")
        assert waiting.returncode == 0
    with other_process() as unneeded:
        assert unneeded.poll() is None
    assert unneeded.returncode == -signal.SIGKILL


def test_a_run_frees_its_weights_before_the_second_copy_is_made(
    two_steps: Recipe, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    living: list[int] = []
    find = verify.find_place

    def looking(*arguments: Any) -> Any:
        gc.collect()
        parameters = [found for found in gc.get_objects() if type(found) is torch.nn.Parameter]
        living.append(sum(parameter.untyped_storage().nbytes() for parameter in parameters if not parameter.is_meta))
        return find(*arguments)

    monkeypatch.setattr(verify, "find_place", looking)
    gc.collect()
    before = sum(
        f.untyped_storage().nbytes() for f in gc.get_objects() if type(f) is torch.nn.Parameter and not f.is_meta
    )
    verb.train(two_steps)
    assert living[0] - before < 100_000, "the base alone has a megabyte"


def test_a_copy_that_memory_does_not_hold_is_left_out(
    two_steps: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "find_place", lambda *_: None)
    verb.train(two_steps)
    assert "not verified, as neither the GPU nor main memory has room" in capsys.readouterr().out


def _record(number: int) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"a {number}"}]
    return {"id": str(number), "image": f"t{number}.png", "conversations": turns}
