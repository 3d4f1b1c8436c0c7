"""What came of a run: a sentence, a few numbers, and what should be known about them."""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from llava_accel.pages.curves import score_title
from llava_accel.pages.history import History
from llava_accel.scoring.best import overfitting

_MOSTLY_BLIND = 0.9
"""Share of the score that the blind model reaches, from which on the page says that images matter little."""

_MUCH_WAITING = 0.2
"""Share of the training time, from which on waiting for data is worth a note."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number."""

    title: str
    value: str
    note: str = ""


def sentence(run: History) -> str:
    """The outcome."""
    chosen, steps = run.chosen, run.steps
    if chosen is None:
        if not steps:
            return "Nothing has been measured yet."
        text = f"training loss went from {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f} in {_steps(run.step)}"
        if not run.is_over:
            return f"So far, {text}."
        unknown = "not evaluated since" if run.evaluations else "the recipe names no held-out data to evaluate on"
        return f"{_capital(text)}; {unknown}, so how well it answers is not known."
    key = run.score
    name = "evaluation loss" if key is None else score_title(key)
    at, before = chosen["eval"].get(key or "loss"), run.before
    what = _value(key, at)
    if before is not None and (key or "loss") in before["eval"]:
        start = before["eval"][key or "loss"]
        verb = "stayed at" if what == _value(key, start) else "rose" if at > start else "fell"
        text = f"{name} {verb} {what}" if verb == "stayed at" else f"{name} {verb} from {_value(key, start)} to {what}"
    else:
        text = f"{name} is {what}"
    if key and "num_answers" in chosen["eval"]:
        text += f" on {round(chosen['eval']['num_answers']):,} held-out questions"
    best = "its best checkpoint, " if run.recipe.checkpoint.best and chosen["step"] != run.step else ""
    text += f", at {best}step {chosen['step']:,}" if best else f", after {_steps(chosen['step'])}"
    blind = chosen["eval"].get(f"blind_{key}")
    if blind is not None:
        text += f". Without seeing the images the same model reaches {_value(key, blind)}"
    if not run.is_over:
        text = f"so far, {text}"
    return f"{_capital(text)}."


def tiles(run: History) -> list[Tile]:
    """The numbers at the top of the page."""
    found: list[Tile] = []
    chosen, before, key = run.chosen, run.before, run.score
    if key and chosen and key in chosen["eval"]:
        if before and key in before["eval"]:
            found.append(Tile(title="Before training", value=_value(key, before["eval"][key]), note=score_title(key)))
        which = f"step {chosen['step']:,}, {score_title(key)}"
        found.append(Tile(title="After training", value=_value(key, chosen["eval"][key]), note=which))
        blind = chosen["eval"].get(f"blind_{key}")
        if blind is not None:
            count = chosen["eval"].get("blind_num_answers")
            found.append(
                Tile(
                    title="Blind",
                    value=_value(key, blind),
                    note="images blanked" + (f", {round(count):,} questions" if count else ""),
                )
            )
    if chosen:
        note = f"from {before['eval']['loss']:.4f}" if before else "nats a target"
        found.append(Tile(title="Evaluation loss", value=f"{chosen['eval']['loss']:.4f}", note=note))
    if steps := run.steps:
        total = f"of {run.num_steps:,}, " if run.num_steps and run.num_steps > run.step else ""
        found.append(Tile(title="Steps", value=f"{run.step:,}", note=f"{total}{_epochs(steps[-1]['epoch'])}"))
        found.append(_time(run))
        speed, tokens = median(line["tokens_per_s"] for line in steps), sum(line["num_tokens"] for line in steps)
        found.append(Tile(title="Tokens a second", value=f"{speed:,.0f}", note=f"{tokens:,} in all"))
        on_gpu = str(run.environment.get("device", "cuda")).startswith("cuda")
        place = "on the first GPU" if on_gpu else "of the main process"
        if memory := [line["peak_memory_gib"] for line in steps if "peak_memory_gib" in line]:
            found.append(Tile(title="Peak memory", value=f"{max(memory):.1f} GiB", note=place))
    return found


def notes(run: History) -> list[str]:
    """What should be known before the numbers are believed."""
    found: list[str] = []
    chosen, key = run.chosen, run.score
    if warning := overfitting(run.lines, run.recipe.eval.patience):
        found.append(f"{_capital(str(warning))}.")
    if run.is_stopped:
        found.append(
            f"Stopped early, after {run.recipe.eval.patience} evaluations without a better {run.recipe.eval.metric} "
            "(eval.patience)."
        )
    if chosen and key and chosen["eval"].get(key):
        score, blind = chosen["eval"][key], chosen["eval"].get(f"blind_{key}", 0.0)
        if blind >= _MOSTLY_BLIND * score:
            found.append(
                f"The images matter little: {blind / score:.0%} of the score is reached without seeing them. "
                "The questions alone may give the answers away."
            )
    waiting = sum(line.get("data_wait_s", 0.0) for line in run.steps)
    if run.steps and waiting > _MUCH_WAITING * sum(line["seconds"] for line in run.steps):
        found.append(
            "The steps waited for data much of their time: more data.workers, smaller files or a faster disk help."
        )
    if any(not math.isfinite(line["loss"]) for line in run.steps):
        found.append("The training loss was not finite in some steps.")
    if count := run.count_lines("nonfinite.jsonl"):
        found.append(
            f"{_steps(count)} made no update: a loss or gradient was not finite (nonfinite.jsonl names the records)."
        )
    if count := run.count_lines("skipped.txt"):
        found.append(f"{count:,} record{'s were' if count > 1 else ' was'} left out; skipped.txt says which and why.")
    return found


def duration(seconds: int | float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"


def _time(run: History) -> Tile:
    training = sum(line["seconds"] for line in run.steps)
    evaluating = sum(line.get("seconds", 0.0) for line in run.evaluations)
    note = f"{duration(training)} training, {duration(evaluating)} evaluation" if evaluating else "training"
    return Tile(title="Time", value=duration(training + evaluating), note=note)


def _value(key: str | None, value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.4f}" if key is None else f"{100 * value:.1f} %"


def _steps(count: int) -> str:
    return f"{count:,} step{'s' if count != 1 else ''}"


def _epochs(count: float) -> str:
    return f"{count:.3g} epoch{'s' if f'{count:.3g}' != '1' else ''}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
