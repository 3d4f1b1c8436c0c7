"""The outcome of a run: a sentence, a few numbers, and what should be known about them."""

import math
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

from llava_accel.console.output import counted
from llava_accel.pages.curves import capital
from llava_accel.pages.history import History
from llava_accel.pages.html import PERCENT, percent
from llava_accel.runtime.timing import duration, waiting_note
from llava_accel.scoring.best import overfitting
from llava_accel.scoring.metrics import margin, score_title

_MOSTLY_BLIND = 0.9
"""Share of the score: if the blind model reaches it, the page says that images matter little."""


class Tile(NamedTuple):
    """One number."""

    title: str
    value: str
    note: str = ""


def sentence(run: History) -> str:
    """The outcome in one or two sentences."""
    chosen, before, key = run.chosen, run.before, run.score
    if chosen is None:
        return _training_sentence(run)
    name = "evaluation loss" if key is None else score_title(key)
    end = _value(key, chosen["eval"].get(key or "loss"))
    if before is not None and (key or "loss") in before["eval"]:
        start, rises = before["eval"][key or "loss"], chosen["eval"].get(key or "loss") > before["eval"][key or "loss"]
        count = before["eval"].get("num_answers")
        some = f" (on {round(count):,} of the questions)" if count != chosen["eval"].get("num_answers") else ""
        change = f"{'rose' if rises else 'fell'} from {_value(key, start)}{some} to {end}"
        text = f"{name} stayed at {end}" if _value(key, start) == end else f"{name} {change}"
    else:
        text = f"{name} is {end}"
    if key and "num_answers" in chosen["eval"]:
        text += f" on {round(chosen['eval']['num_answers']):,} held-out questions"
    is_best = run.recipe.checkpoint.best and chosen["step"] != run.step
    text += (
        f", at its best checkpoint, step {chosen['step']:,}"
        if is_best
        else f", after {counted(chosen['step'], 'step')}"
    )
    blind = chosen["eval"].get(f"blind_{key}")
    if blind is not None:
        text += f". Without seeing the images the same model reaches {_value(key, blind)}"
    return capital(f"{text}." if run.is_over else f"so far, {text}.")


def _training_sentence(run: History) -> str:
    steps = run.steps
    if not steps:
        return "Nothing has been measured yet."
    text = f"training loss went from {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f} in {counted(run.step, 'step')}"
    if not run.is_over:
        return f"So far, {text}."
    unknown = "not evaluated since" if run.evaluations else "the recipe names no held-out data to evaluate on"
    return f"{capital(text)}; {unknown}, so how well it answers is not known."


def tiles(run: History) -> list[Tile]:
    """The numbers at the top of the page."""
    shown: list[Tile] = []
    chosen, before, key = run.chosen, run.before, run.score
    if key and chosen and key in chosen["eval"]:
        if before and key in before["eval"]:
            shown.append(Tile("Before training", _value(key, before["eval"][key]), score_title(key)))
        which = f"step {chosen['step']:,}, {score_title(key)}{_margin(chosen, key)}"
        shown.append(Tile("After training", _value(key, chosen["eval"][key]), which))
        blind, count = chosen["eval"].get(f"blind_{key}"), chosen["eval"].get("blind_num_answers")
        if blind is not None:
            questions = f", {round(count):,} questions" if count else ""
            note = f"images blanked{questions}{_margin(chosen, f'blind_{key}')}"
            shown.append(Tile("Blind", _value(key, blind), note))
        if (common := chosen["eval"].get(f"common_{key}")) is not None:
            note = f"if it were given to every question{_margin(chosen, f'common_{key}')}"
            shown.append(Tile("Commonest answer", _value(key, common), note))
    if chosen:
        note = f"from {before['eval']['loss']:.4f}" if before else run.recipe.loss_unit
        shown.append(Tile("Evaluation loss", f"{chosen['eval']['loss']:.4f}", note))
    if steps := run.steps:
        total = f"of {run.num_steps:,}, " if run.num_steps and run.num_steps > run.step else ""
        shown.append(Tile("Steps", f"{run.step:,}", f"{total}{_epochs(steps[-1]['epoch'])}"))
        shown.append(_time(run))
        speed, tokens = median(line["tokens_per_s"] for line in steps), sum(line["num_tokens"] for line in steps)
        shown.append(Tile("Tokens a second", f"{speed:,.0f}", f"{tokens:,} in all"))
        on_gpu = run.environment.get("device", "cpu") != "cpu"
        if memory := [line["peak_memory_gib"] for line in steps if "peak_memory_gib" in line]:
            place = "on the first GPU" if on_gpu else "of the main process"
            shown.append(Tile("Peak memory", f"{max(memory):.1f} GiB", place))
    return shown


def notes(run: History) -> list[str]:
    """Warnings that a reader should know before believing the numbers."""
    shown: list[str] = []
    chosen, key = run.chosen, run.score
    if warning := overfitting(run.lines, run.recipe.eval.patience):
        shown.append(f"{capital(warning)}.")
    if run.is_stopped:
        shown.append(
            f"Stopped early, after {run.recipe.eval.patience} evaluations without a better {run.recipe.eval.metric} "
            "(eval.patience)."
        )
    if chosen and key and chosen["eval"].get(key):
        score, blind = chosen["eval"][key], chosen["eval"].get(f"blind_{key}", 0.0)
        if blind >= _MOSTLY_BLIND * score:
            shown.append(
                f"The images matter little: {100 * blind / score:.0f}{PERCENT} of the score is reached without seeing them. "
                "The questions alone may give the answers away."
            )
        if score <= chosen["eval"].get(f"common_{key}", -1.0):
            shown.append("Giving the commonest answer to every question, without a model, scores as much.")
    if waiting := waiting_note(run.seconds):
        shown.append(f"{waiting.replace('%', PERCENT)}.")
    if any(not math.isfinite(line["loss"]) for line in run.steps):
        shown.append("The training loss was not finite in some steps.")
    if count := max((line.get("num_overflows", 0) for line in run.steps), default=0):
        shown.append(
            f"fp16 overflowed {counted(count, 'time')}: the step was computed once more at a lower loss "
            "scale, and nothing of it was lost."
        )
    if count := run.count_lines("nonfinite.jsonl"):
        shown.append(
            f"{counted(count, 'step')} made no update: a loss or gradient was not finite. nonfinite.jsonl names the "
            "records."
        )
    if count := run.count_lines("skipped.txt"):
        shown.append(f"{count:,} record{'s were' if count > 1 else ' was'} left out; skipped.txt says which and why.")
    return shown


def _time(run: History) -> Tile:
    training = sum(line["seconds"] for line in run.steps)
    evaluating = sum(line.get("seconds", 0.0) for line in run.evaluations)
    note = f"{duration(training)} training, {duration(evaluating)} evaluation" if evaluating else "training"
    return Tile("Time", duration(training + evaluating), note)


def _value(key: str | None, value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4f}" if key is None else percent(value)


def _margin(chosen: Mapping[str, Any], key: str) -> str:
    """Half the width of a score's interval at the end of a note."""
    text = margin(chosen["eval"], key).strip()
    return f", {text} points" if text else ""


def _epochs(count: float) -> str:
    return f"{count:.3g} epoch{'s' if f'{count:.3g}' != '1' else ''}"
