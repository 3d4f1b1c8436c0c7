"""Reads a run folder, once for everything that the page shows."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava_accel.exceptions import UserError
from llava_accel.recipe import Recipe, load_recipe
from llava_accel.runtime.timing import PHASES
from llava_accel.scoring.best import Line, best_evaluation, is_out_of_patience, read_lines
from llava_accel.scoring.harmful import HARMFUL
from llava_accel.scoring.held_out import FILE
from llava_accel.scoring.metrics import PAIR, main_score
from llava_accel.setup.figures import FIGURES
from llava_accel.setup.run_folder import ENDED
from llava_accel.setup.state import TrainState
from llava_accel.storage.folder_lock import is_held
from llava_accel.storage.jsonl import read_json_lines
from llava_accel.storage.run_weights import PROGRESS, complete_checkpoints

Prediction = dict[str, Any]
_OF_SOURCE = "num_examples/"


class Status(NamedTuple):
    """The state of a run: its kind (running, finished, stopped or failed), and in words."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class History:
    """One run, from its start until now."""

    folder: Path
    recipe: Recipe
    environment: dict[str, Any]
    lines: list[dict[str, Any]]
    """All of metrics.jsonl."""
    num_steps: int | None
    """Steps of the whole run; None where no checkpoint says so."""
    is_stopped: bool
    """Whether the run ended early, because it no longer improved."""
    end: dict[str, Any]
    """How it ended, as the run itself noted; empty if it could not."""
    is_held: bool
    """Whether a process writes its folder."""
    figures: dict[str, Any]
    """The figures of its data, see `setup.figures`; empty where there are none."""

    @property
    def name(self) -> str:
        return self.recipe.run.name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training."""
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluations."""
        return [line for line in self.lines if "eval" in line]

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def is_over(self) -> bool:
        """Whether the run is over; a run without a checkpoint counts as over."""
        return self.is_stopped or self.num_steps is None or self.step >= self.num_steps

    @property
    def status(self) -> Status | None:
        """The state of the run, as its folder shows it; None where nothing does."""
        place = f"step {self.step:,}" + (f" of {self.num_steps:,}" if self.num_steps else "")
        how, detail = self.end.get("how"), self.end.get("detail", "")
        if how == "signal":
            return Status("stopped", f"stopped by {detail} at {place}; the same command goes on")
        if how == "error":
            return Status("failed", f"ended by an error at {place}: {detail}")
        if how is None and self.is_held:
            return Status("running", f"running: {place}, when this page was written")
        if how is None and self.num_steps is None:
            return None
        if how == "patience" or (self.is_stopped and self.num_steps and self.step < self.num_steps):
            return Status("finished", f"stopped early at {place}")
        if how == "finished" or self.is_over:
            return Status("finished", "finished")
        return Status("failed", f"broke off at {place}: no process runs it any more")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of training in each of `timing.PHASES`."""
        return {phase: sum(line.get(f"{phase}_s", 0.0) for line in self.steps) for phase in PHASES}

    @property
    def trained_examples(self) -> dict[str, int]:
        """How many examples of each source it has trained on; empty where there is one source."""
        counts: dict[str, int] = {}
        for line in self.steps:
            for key, value in line.items():
                if key.startswith(_OF_SOURCE):
                    name = key.removeprefix(_OF_SOURCE)
                    counts[name] = counts.get(name, 0) + value
        return counts

    @property
    def before(self) -> dict[str, Any] | None:
        """The evaluation of the base."""
        first = self.evaluations[:1]
        return first[0] if first and first[0]["step"] == 0 else None

    @property
    def chosen(self) -> Line | None:
        """The evaluation that the page is about: that of `best/`, or the last one where the run keeps no best."""
        trained = [line for line in self.evaluations if line["step"] > 0]
        best = best_evaluation(trained, self.recipe.eval.metric) if self.recipe.checkpoint.best else None
        return best or (trained[-1] if trained else None)

    @property
    def score(self) -> str | None:
        """The main score of the recipe's metric, or None."""
        return main_score(self.recipe.eval.metric, {key for line in self.evaluations for key in line["eval"]})

    @property
    def answer_score(self) -> str:
        """The main score of the generated answers, which those of pairs are not."""
        measured = {key for line in self.evaluations for key in line["eval"]} - set(PAIR)
        metric = self.recipe.eval.metric
        return main_score("loss" if metric in PAIR else metric, measured) or "exact_match"

    def predictions(self, step: int) -> list[Prediction]:
        """The answers of the evaluation at `step`; none where it left no file."""
        return self._read_predictions(f"step-{step:06d}.jsonl")

    @property
    def training_predictions(self) -> list[Prediction]:
        """The answers to some training examples after the last step; none before it."""
        return self._read_predictions(FILE)

    @property
    def harmful(self) -> list[dict[str, Any]]:
        """The lines of `scoring.harmful`; none before the run's end."""
        return self._read_predictions(HARMFUL)

    def _read_predictions(self, name: str) -> list[Prediction]:
        return _undamaged(self.folder / "predictions" / name, _read_objects) or []

    def count_lines(self, name: str) -> int:
        """Lines of a file of the run folder, 0 where there is none."""
        path = self.folder / name
        return path.read_bytes().count(b"\n") if path.is_file() else 0


def read_run(folder: Path, state: TrainState | None = None) -> History:
    """Read a run folder.

    Args:
        state: The run's state, if this process runs it; else its newest checkpoint is read.

    Raises:
        UserError: it is not a run folder, or something in it cannot be read.
    """
    if not (folder / "recipe.toml").is_file():
        raise UserError(
            f"{folder} is not a run: it has no recipe.toml. Name the folder of a run, such as runs/quickstart"
        )
    known = _newest_state(folder) if state is None else state.state_dict()
    num_steps, lines = known.get("num_steps"), read_lines(folder / "metrics.jsonl")
    recipe = load_recipe(folder / "recipe.toml", warns=False)
    return History(
        folder=folder,
        recipe=recipe,
        environment=_read_json(folder / "environment.json"),
        lines=lines,
        num_steps=None if num_steps is None else int(num_steps),
        is_stopped=is_out_of_patience(lines, recipe.eval.metric, recipe.eval.patience),
        end=_read_json(folder / ENDED),
        is_held=is_held(folder),
        figures=_read_json(folder / FIGURES),
    )


def _read_objects(path: Path) -> list[dict[str, Any]]:
    rows = read_json_lines(path)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not an object")
    return rows


def titles(runs: Sequence[History]) -> list[str]:
    """A title for each run: its name, or where names repeat that of its folder, or its whole path."""
    for known in ([run.name for run in runs], [run.folder.resolve().name for run in runs]):
        if len(set(known)) == len(runs):
            return known
    return [str(run.folder) for run in runs]


def _newest_state(folder: Path) -> dict[str, Any]:
    checkpoints = complete_checkpoints(folder / "checkpoints")
    return _read_json(checkpoints[-1] / "engine" / PROGRESS).get("state", {}) if checkpoints else {}


def _read_json(path: Path) -> dict[str, Any]:
    content = _undamaged(path, lambda path: json.loads(path.read_bytes()))
    return content if isinstance(content, dict) else {}


def _undamaged(path: Path, read: Callable[[Path], Any]) -> Any:
    """The result of `read` for a file that the report can do without; None where there is no such file."""
    try:
        return read(path) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Remove it to write the report without it") from None
