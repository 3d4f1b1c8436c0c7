"""Writes the pages: of one run, also while it goes on, and of several; and gives answers as images to trackers."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFont, ImageOps

from llava_accel.console.output import Console, printable
from llava_accel.data.images import decode
from llava_accel.data.spread import spread
from llava_accel.exceptions import UserError
from llava_accel.pages import details
from llava_accel.pages.compare import comparison
from llava_accel.pages.curves import curves, length_plots
from llava_accel.pages.gallery import cards, choose, doubts, image_file, image_roots, training_cards, verdict
from llava_accel.pages.history import History, Prediction, read_run
from llava_accel.pages.html import Live, render, write_page
from llava_accel.pages.outcome import notes, sentence, tiles
from llava_accel.recipe import DataTable, Recipe, dump_recipe
from llava_accel.runtime.trackers import Trackers
from llava_accel.scoring.best import overfitting, read_lines
from llava_accel.scoring.classes import confusion
from llava_accel.scoring.harmful import CONTRADICTED, WRONG
from llava_accel.scoring.metrics import cell, judged, score_title
from llava_accel.setup.state import TrainState
from llava_accel.sources.problems import DataError

REPORT = "report.html"
_T = TypeVar("_T")


def write_report(folder: Path, state: TrainState | None = None) -> Path:
    """Write `report.html` into a run folder.

    Args:
        state: The run's state, if this process runs it.

    Raises:
        UserError: the folder is not a run, or something in it is damaged.
        OSError: it cannot be read or written.
    """
    write_page(folder / REPORT, report_page(read_run(folder, state)))
    return folder / REPORT


def report_page(run: History, live: Live | None = None) -> str:
    """The report of a run as HTML."""
    return render("report.html.j2", _context(run), live)


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one page that compares several runs.

    Raises:
        UserError, OSError: as `write_report`; or a run is named twice.
    """
    refuse_repeated(folders)
    write_page(out, comparison_page([read_run(folder) for folder in folders]))
    return out


def comparison_page(runs: Sequence[History], live: Live | None = None) -> str:
    """The comparison of runs as HTML."""
    return render("compare.html.j2", comparison(runs), live)


def refuse_repeated(folders: Sequence[Path]) -> None:
    """Raise UserError if a run is named twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice. Name each run once")


def confused(predictions: Sequence[Prediction]) -> tuple[list[str], list[tuple[str, list[int]]]] | None:
    """The confusion matrix of the classes that answers name; None where nothing was answered."""
    answers = [judged(row) for row in predictions]
    if not answers:
        return None
    return confusion([each.prediction for each in answers], [each.references[0] for each in answers])


def _context(run: History) -> dict[str, object]:
    chosen, before, metric = run.chosen or run.before, run.before, run.answer_score
    predictions = run.predictions(chosen["step"]) if chosen else []
    earlier = run.predictions(before["step"]) if before and before is not chosen else []
    harmful = run.harmful
    return {
        "run": run,
        "sentence": sentence(run),
        "tiles": tiles(run),
        "notes": notes(run),
        "plots": curves(run),
        "columns": details.evaluation_columns(run.evaluations),
        "cell": cell,
        "chosen": chosen,
        "cards": cards(predictions, earlier, run.recipe.data, metric),
        "training_cards": training_cards(run.training_predictions, run.recipe.data, metric),
        "wrong": doubts(harmful, WRONG, run.recipe.data),
        "contradicted": doubts(harmful, CONTRADICTED, run.recipe.data),
        "doubts_command": details.doubts_command(run),
        "num_predictions": len(predictions),
        "metric": metric,
        "score_title": score_title(metric),
        "confusion": confused(predictions) if "classification" in run.recipe.eval.measured else None,
        "types": details.type_tables(predictions, earlier, metric),
        "data_rows": details.data_rows(run),
        "source_rows": details.source_rows(run),
        "common_answers": details.common_answers(run),
        "length_plots": length_plots(run),
        "recipe_rows": details.recipe_rows(run),
        "recipe_text": dump_recipe(run.recipe),
        "environment": details.environment_rows(run),
        "commands": details.commands(run),
    }


def send_images(recipe: Recipe, state: TrainState, trackers: Trackers, console: Console) -> None:
    """Give the images and answers of an evaluation to the trackers, if there are any. For the main process."""
    folder = Path(recipe.run.output_dir)
    if trackers.are_there:
        _attempt(lambda: _send_images(folder, state, trackers), folder, console)


def report_progress(recipe: Recipe, state: TrainState, console: Console) -> None:
    """Write the report of a run that goes on. For the main process."""
    folder = Path(recipe.run.output_dir)
    _attempt(lambda: write_report(folder, state), folder, console)


def report_end(recipe: Recipe, state: TrainState, console: Console) -> None:
    """Write the report of the whole run, and say where it is. For the main process."""
    folder = Path(recipe.run.output_dir)
    if _attempt(lambda: write_report(folder, state), folder, console):
        console.line(f"report: {folder / REPORT}")


def say_overfitting(recipe: Recipe, console: Console) -> None:
    """Print the overfitting note at the first evaluation of a run that shows it."""
    lines = read_lines(Path(recipe.run.output_dir) / "metrics.jsonl")
    ends = [number for number, line in enumerate(lines, start=1) if "eval" in line]
    note = overfitting(lines[: ends[-1]], recipe.eval.patience) if ends else None
    if note and not any(overfitting(lines[:end], recipe.eval.patience) for end in ends[:-1]):
        console.line(f"note: {note}")


def _send_images(folder: Path, state: TrainState, trackers: Trackers) -> None:
    run = read_run(folder, state)
    images = tracker_images(run.predictions(state.step), run.recipe.data, run.answer_score)
    trackers.images(images, state.step)


def _attempt(action: Callable[[], object], folder: Path, console: Console) -> bool:
    _, reason = attempted(action)
    if reason:
        console.line(f"report: not written ({reason}). The run goes on; to see why, run `llava-accel report {folder}`")
    return not reason


def attempted(action: Callable[[], _T]) -> tuple[_T | None, str]:
    """What `action` returns, or None and why it failed."""
    try:
        return action(), ""
    except Exception as error:
        # Drawing, decoding and templates are work of four libraries, done beside a run that may be days old: whatever
        # they raise, the run must go on. Nothing is hidden by it: the same error comes back from the verb.
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


_MOST = 12
_SIDE, _LINE, _LINES, _COLUMNS = 224, 15, 5, 36  # px, px, lines of text, characters a line
_COLORS = {"right": (27, 122, 67), "partly": (138, 97, 0), "wrong": (179, 55, 43)}


def tracker_images(predictions: Sequence[Prediction], data: DataTable, metric: str) -> list[Image.Image]:
    """At most twelve images, right and wrong mixed; those that cannot be read are left out."""
    roots = image_roots(data)
    shown: list[Image.Image] = []
    chosen = sorted(choose(predictions, metric))
    for place in spread(len(chosen), _MOST):
        row = predictions[chosen[place]]
        name = row["image"] if isinstance(row["image"], str) else next(iter(row["image"]), "")
        try:
            shown.append(_tile(decode(image_file(name, roots), data.exif), row, metric))
        except DataError:  # the report says of each what is wrong with it
            continue
    return shown


def _tile(image: Image.Image, row: Prediction, metric: str) -> Image.Image:
    square = ImageOps.pad(image, (_SIDE, _SIDE), color="white")
    tile = ImageOps.expand(square, (0, 0, 0, _LINES * _LINE + 8), "white")
    result = verdict(row[metric])
    answer = max(row["answers"], key=row["answers"].get)
    lines = [(text, (29, 31, 33)) for text in _wrapped(row["question"])[:3]]
    lines.append((_wrapped(f"{result}: {row['prediction']}")[0], _COLORS[result]))
    lines.append((_wrapped(f"expected: {answer}")[0], (98, 102, 107)))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    for number, (text, color) in enumerate(lines):
        draw.text((6, _SIDE + 4 + number * _LINE), text, fill=color, font=font)
    return tile


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(printable(text), _COLUMNS) or [""]
