"""Fixtures that several rooms share. Nothing here needs a network, a hub or a GPU."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from helpers.exported import export, fine_tune
from helpers.tiny import make_llava

# Tiny models lose time to threads, and runs that are compared bit by bit must sum in the same order in every process.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """For a test in another precision than those around it: accelerate keeps one for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained LLaVA in the hub's layout, whose layers 4 bits can pack."""
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def tower_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the vision tower's weights as they are read whole from a base's files. Fingerprints read a row of each."""
    from llava_accel.model import weights

    reads: list[str] = []

    class Watched:
        def __init__(self, name: str, tensor: Any) -> None:
            self.name, self.tensor = name, tensor

        def __getitem__(self, key: object) -> Any:
            if key is Ellipsis:
                reads.append(self.name)
            return self.tensor[key]

    def gather(*arguments: Any) -> weights.Stored:
        found = original(*arguments)
        tower = {name: tensor for name, tensor in found.items() if name.startswith("model.vision_tower.")}
        return found | {name: replace(each, tensor=Watched(name, each.tensor)) for name, each in tower.items()}

    original = weights.gather
    monkeypatch.setattr(weights, "gather", gather)
    return reads


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, llava_folder: Path) -> Path:
    """A run of LoRA on that base, two steps long."""
    return fine_tune(tmp_path_factory.mktemp("lora"), model={"base": str(llava_folder)}, checkpoint={"verify": True})


@pytest.fixture(scope="session")
def lora_exports(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That run in each form of `llava_accel.export`."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        return {form: export(patch, lora_run, form, folder / form) for form in ("peft", "merged", "llava")}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the train.json and eval.json of interrupted.py."""
    # Not at the top: the package may only be imported when the plugin that checks its types and shapes is there.
    from helpers.interrupted import NUM_RECORDS
    from helpers.runs import mixed_records, write_records

    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "train.json", mixed_records(NUM_RECORDS))
    write_records(folder / "eval.json", mixed_records(3))
    return folder


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run of interrupted.py that nothing interrupted."""
    from helpers.interrupted import settings, train

    return train(settings(tmp_path_factory.mktemp("whole"), data))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many broken inputs were tried, and how many ended as they should (tests/broken)."""
    counts = {
        outcome: sum("::test_broken_input" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        tried = counts["passed"] + counts["failed"] + counts["error"]
        skipped = f", {counts['skipped']} cannot be made here" if counts["skipped"] else ""
        terminalreporter.write_line(f"broken inputs: {tried} tried, {counts['passed']} passed{skipped}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs on one process and on two, of any engine: see helpers/jobs.py."""
    from helpers.jobs import Lab

    lab = Lab(tmp_path_factory.mktemp("backends"))
    yield lab
    lab.end()
