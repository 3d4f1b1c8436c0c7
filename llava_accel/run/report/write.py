"""The pages: of one run, which is written into its folder, and of several."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from llava_accel.run.report import details
from llava_accel.run.report.compare import comparison
from llava_accel.run.report.curves import curves, score_title
from llava_accel.run.report.gallery import cards, training_cards
from llava_accel.run.report.history import History, read_run
from llava_accel.run.report.outcome import notes, sentence, tiles
from llava_accel.run.report.page import render, write_page
from llava_accel.run.state import TrainState

REPORT = "report.html"


def write_report(folder: Path, state: TrainState | None = None) -> Path:
    """Write `report.html` into a run folder.

    Args:
        state: Where the run stands, if it is this process that runs it.

    Raises:
        ValueError: the folder is no run, or something in it is damaged.
        OSError: it cannot be read or written.
    """
    run = read_run(folder, state)
    write_page(folder / REPORT, render("report.html.j2", _context(run)))
    return folder / REPORT


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write one page that compares several runs.

    Raises:
        ValueError, OSError: as `write_report`; or a run is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is named twice. Name each run once")
    write_page(out, render("compare.html.j2", comparison([read_run(folder) for folder in folders]) | _written()))
    return out


def _context(run: History) -> dict[str, object]:
    chosen, before = run.chosen or run.before, run.before
    metric = run.score or "exact_match"
    predictions = run.predictions(chosen["step"]) if chosen else []
    earlier = run.predictions(before["step"]) if before and before is not chosen else []
    shown = cards(predictions, earlier, run.recipe.data, metric)
    return {
        "run": run,
        "sentence": sentence(run),
        "tiles": tiles(run),
        "notes": notes(run),
        "plots": curves(run),
        "columns": details.evaluation_columns(run.evaluations),
        "cell": details.cell,
        "chosen": chosen,
        "cards": shown,
        "training_cards": training_cards(run.training_predictions, run.recipe.data, metric),
        "num_predictions": len(predictions),
        "score_title": score_title(metric),
        "types": details.type_tables(predictions, earlier, metric),
        "recipe_rows": details.recipe_rows(run),
        "recipe_text": details.recipe_text(run),
        "environment": details.environment_rows(run),
        "commands": details.commands(run),
    } | _written()


def _written() -> dict[str, object]:
    return {"written": f"{datetime.now():%Y-%m-%d %H:%M}"}
