"""The report of a run that is under way: written as evaluations come in, and never a reason for the run to end."""

from collections.abc import Callable
from pathlib import Path

from llava_accel.recipe import Recipe
from llava_accel.run.choosing import overfitting, read_lines
from llava_accel.run.console import Screen
from llava_accel.run.report.history import read_run
from llava_accel.run.report.tracker_pictures import tracker_pictures
from llava_accel.run.report.write import write_report
from llava_accel.run.state import TrainState
from llava_accel.run.trackers import Trackers


def report_evaluation(recipe: Recipe, state: TrainState, trackers: Trackers, screen: Screen) -> None:
    """Write the report after an evaluation, and give its pictures to the trackers. For the main process.

    After the last evaluation it is left to `report_end`.
    """
    folder = Path(recipe.run.output_dir)
    if trackers.are_there:
        _attempt(lambda: _send_pictures(folder, state, trackers), folder, screen)
    if state.step < state.num_steps and not state.is_stopped:
        _attempt(lambda: write_report(folder, state), folder, screen)


def report_end(recipe: Recipe, state: TrainState, screen: Screen) -> None:
    """Write the report of the whole run, and say where it is. For the main process."""
    folder = Path(recipe.run.output_dir)
    if _attempt(lambda: write_report(folder, state), folder, screen):
        screen.line(f"report: {folder / 'report.html'}")


def say_overfitting(recipe: Recipe, screen: Screen) -> None:
    """Print the overfitting note at the evaluation that first shows it."""
    lines = read_lines(Path(recipe.run.output_dir) / "metrics.jsonl")
    found = overfitting(lines, recipe.eval.patience)
    if found and overfitting(lines[:-1], recipe.eval.patience) is None:
        screen.line(f"note: {found}")


def _send_pictures(folder: Path, state: TrainState, trackers: Trackers) -> None:
    run = read_run(folder, state)
    pictures = tracker_pictures(run.predictions(state.step), run.recipe.data, run.score or "exact_match")
    trackers.pictures(pictures, state.step)


def _attempt(action: Callable[[], object], folder: Path, screen: Screen) -> bool:
    try:
        action()
    except Exception as error:
        # Drawing, decoding and templates are work of four libraries, done beside a run that may be days old: whatever
        # they raise, the run must go on. Nothing is hidden by it: the same error comes back from the verb.
        reason = " ".join(str(error).split())[:300]
        screen.line(
            f"report: not written ({type(error).__name__}: {reason}). The run goes on; to see why, run "
            f"`python -m llava_accel.report {folder}`"
        )
        return False
    return True
