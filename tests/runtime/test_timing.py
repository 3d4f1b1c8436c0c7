"""Where the time goes: laps that add up to the whole, in the log, in the summary, and in the same words everywhere."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_accel.train as verb
from helpers.runs import metrics, mixed_records, recipe, write_records
from llava_accel.checkpoint.store import Checkpoints
from llava_accel.console.output import Console
from llava_accel.model.objective import Objective
from llava_accel.runtime import timing
from llava_accel.runtime.timing import PHASES, Phases, take_peak, waiting_note

pytestmark = pytest.mark.slow

SLOW_S = 5.0


class Clock:
    """A clock that other work on the machine cannot slow: it ticks when it is read, and rests on purpose."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-4
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the rows of the tables that it printed, and its seconds, set-up included."""

    folder: Path
    tables: dict[str, list[list[str]]]
    seconds: float


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose tower and saving take time on purpose."""
    folder = tmp_path_factory.mktemp("timing")
    data = write_records(folder / "data.json", mixed_records(6))
    encode, begin, clock = Objective.encode, Checkpoints._begin, Clock()
    tables: dict[str, list[list[str]]] = {}

    def slow_encode(self: Objective, *values: torch.Tensor) -> torch.Tensor:
        clock.sleep(SLOW_S)
        return encode(self, *values)

    def slow_begin(self: Checkpoints, *values: Any, **named: Any) -> Any:
        clock.sleep(SLOW_S)
        return begin(self, *values, **named)

    table = recipe(
        folder,
        data,
        data={"eval": str(data), "cache_features": False},
        train={"per_device_batch_size": 3, "max_steps": 4},
        eval={"every": 2},
        checkpoint={"every": 2},
    )
    with pytest.MonkeyPatch().context() as patched:
        patched.setattr(timing, "time", clock)
        patched.setattr(Objective, "encode", slow_encode)
        patched.setattr(Checkpoints, "_begin", slow_begin)
        patched.setattr(Console, "table", lambda self, title, columns, rows, **_: tables.update({title: rows}))
        begun = clock.now
        verb.train(table)
        return Run(folder / "run", tables, clock.now - begun)


def test_the_phases_of_a_line_add_up_to_its_seconds(run: Run) -> None:
    steps = [line for line in metrics(run.folder) if "loss" in line]
    assert len(steps) == 4
    for line in steps:
        training = sum(line[f"{phase}_s"] for phase in PHASES if phase not in ("evaluation", "saving"))
        assert line["seconds"] == pytest.approx(training, abs=1e-3)
        assert all(line[f"{phase}_s"] > 0 for phase in ("data_wait", "vision", "forward", "backward", "optimizer"))


def test_each_second_is_counted_where_it_belongs(run: Run) -> None:
    steps = [line for line in metrics(run.folder) if "loss" in line]
    # The tower is slow in training and in evaluation, and only the former is a step's vision.
    assert all(SLOW_S <= line["vision_s"] < 3 * SLOW_S for line in steps)
    assert all(line["forward_s"] < SLOW_S for line in steps)
    assert [line["evaluation_s"] > SLOW_S for line in steps] == [False, False, True, False]
    assert [line["saving_s"] > SLOW_S for line in steps] == [False, False, True, False]
    assert all(line["other_s"] < SLOW_S for line in steps), "reports and checkpoints are no part of the steps"


def test_the_summary_accounts_for_the_whole_run(run: Run) -> None:
    rows = {name: cells for name, *cells in run.tables["where the time went"]}
    total = float(rows["all"][0])
    shares = [float(cells[1].rstrip("%")) for name, cells in rows.items() if name != "all"]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert total == pytest.approx(run.seconds, abs=1), "what is slow stands in a phase"
    # Two checkpoints and the export at the end: the last two come after the last line of the log.
    assert float(rows["saving"][0]) >= 3 * SLOW_S


def test_every_line_tells_the_peak_of_memory(run: Run) -> None:
    peaks = [line["peak_memory_gib"] for line in metrics(run.folder) if "loss" in line]
    assert peaks == sorted(peaks) and peaks[-1] <= round(take_peak(torch.device("cpu")) / 2**30, 3)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert peaks[-1] == pytest.approx(int(status["VmHWM"].split()[0]) / 2**20, rel=0.5)


def test_a_note_is_due_where_a_tenth_of_training_is_waiting() -> None:
    assert waiting_note({"data_wait": 0.9, "forward": 9.1, "evaluation": 0.0}) == ""
    assert waiting_note({"data_wait": 2.0, "forward": 8.0, "saving": 90.0}).startswith("20% of training's time")
    assert waiting_note({}) == ""


def test_laps_add_up_to_the_time_that_has_passed() -> None:
    begun = time.perf_counter()
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        phases.enter("forward")
        time.sleep(0.01)
        phases.enter("data_wait")
        time.sleep(0.005)
    found, passed = phases.take(), time.perf_counter() - begun
    assert found["forward"] >= 0.02 and found["data_wait"] >= 0.01
    assert sum(found.values()) == pytest.approx(passed, abs=1e-2)
    assert sum(phases.take().values()) < 0.02, "what was taken is not counted again"
