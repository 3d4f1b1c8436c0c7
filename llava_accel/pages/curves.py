"""Which curves a page shows: of one run, or of several over one another."""

from collections.abc import Sequence
from typing import Any

from llava_accel.pages.history import History
from llava_accel.pages.plots import SERIES, Plot, Series, Shares
from llava_accel.runtime.timing import PHASES
from llava_accel.scoring.metrics import SCORES


def score_title(key: str) -> str:
    """What people call a score; what is none of those known goes by its key."""
    return SCORES.get(key, key.replace("_", " "))


def curves(run: History) -> list[Plot | Shares]:
    """The plots of one run; those without data are left out."""
    steps, evaluations = run.steps, run.evaluations
    chosen = run.chosen
    mark = "best" if run.recipe.checkpoint.best else "last"
    marks = {mark: chosen["step"]} if chosen and len(evaluations) > 2 else {}
    plots = [
        Plot(
            title="Loss",
            note="Cross-entropy in nats a target, over all targets of all ranks.",
            series=[
                _of(steps, "loss", "training"),
                _of_eval(evaluations, "loss", "evaluation", 1),
            ],
            is_log=True,
            steps=marks,
        )
    ]
    plots.append(
        Plot(
            title="Score",
            note="On the held-out data. Blind is the same model with the images blanked.",
            series=_scores(run),
            is_percent=True,
            from_zero=True,
            steps=marks,
        )
    )
    parts = sorted({key for line in steps for key in line if key.startswith("learning_rate/")})
    parts = parts or ["learning_rate"]
    rates = [_of(steps, key, key.rpartition("/")[2].replace("_", " "), n, is_exact=True) for n, key in enumerate(parts)]
    limit = run.recipe.optim.max_grad_norm
    plots += [
        Plot(
            title="Learning rate",
            note="Of each part that is trained.",
            series=rates,
        ),
        Plot(
            title="Gradient norm",
            note=f"Of the whole gradient, before it is clipped to {limit:g}." if limit else "Of the whole gradient.",
            series=[_of(steps, "grad_norm", "gradient norm")],
            is_log=True,
            level=limit or None,
        ),
        Plot(
            title="Tokens a second",
            note="Over all ranks, image tokens included, padding not.",
            series=[_of(steps, "tokens_per_s", "tokens a second", 3)],
            from_zero=True,
        ),
    ]
    return [*(plot for plot in map(_less_empty, plots) if plot.series), *_times(run)]


def compared_curves(runs: Sequence[History], titles: Sequence[str]) -> list[Plot]:
    """Loss, scores and speed of several runs, one colour a run."""

    def each(key: str, is_eval: bool = True) -> list[Series]:
        return [
            _of_eval(run.evaluations, key, title, n) if is_eval else _of(run.steps, key, title, n)
            for n, (run, title) in enumerate(zip(runs, titles, strict=True))
        ]

    plots = [
        Plot(title="Training loss", note="Cross-entropy in nats a target.", series=each("loss", False), is_log=True),
        Plot(
            title="Evaluation loss",
            note="Cross-entropy in nats a target, held-out data.",
            series=each("loss"),
            is_log=True,
        ),
        *(
            Plot(
                title=score_title(score)[:1].upper() + score_title(score)[1:],
                note="On the held-out data.",
                series=each(score),
                is_percent=True,
                from_zero=True,
            )
            for score in SCORES
        ),
        Plot(title="Tokens a second", note="Over all ranks.", series=each("tokens_per_s", False), from_zero=True),
    ]
    return [plot for plot in map(_less_empty, plots) if plot.series]


def _scores(run: History) -> list[Series]:
    """The score in front and its blind one; the other scores where they are other numbers."""
    front, lines = run.score or "exact_match", run.evaluations
    series = [
        _of_eval(lines, front, score_title(front), 1),
        _of_eval(lines, f"blind_{front}", "blind", 2, dashes=1),
    ]
    for number, other in enumerate((key for key in SCORES if key != front), start=3):
        pairs = [(line["eval"][front], line["eval"][other]) for line in lines if {front, other} <= line["eval"].keys()]
        if any(abs(one - another) > 5e-4 for one, another in pairs):
            series.append(_of_eval(lines, other, score_title(other), number))
    return series


def _times(run: History) -> list[Shares]:
    """Where the time went, of a run whose lines tell; what is less than a fiftieth goes under "other"."""
    seconds = {phase: sum(line.get(f"{phase}_s", 0.0) for line in run.steps) for phase in PHASES}
    whole = sum(seconds.values())
    named = [(name, part) for name, part in seconds.items() if name != "other" and part > 0.02 * whole]
    if not named:
        return []
    largest = sorted(named, key=lambda pair: -pair[1])[: len(SERIES) - 1]
    parts = {name.replace("_", " "): float(part) for name, part in largest}
    parts["other"] = max(0.0, whole - sum(parts.values()))
    note = "On the main process. Reading data goes on beside the steps; only what they wait for it counts."
    return [Shares(title="Where the time went", note=note, parts=parts)]


def _of(lines: Sequence[dict[str, Any]], key: str, label: str, color: int = 0, *, is_exact: bool = False) -> Series:
    found = [line for line in lines if key in line]
    steps, values = [line["step"] for line in found], [float(line[key]) for line in found]
    # Exact lines often lie over one another.
    return Series(label=label, steps=steps, values=values, color=color, is_exact=is_exact, dashes=color * is_exact)


def _of_eval(lines: Sequence[dict[str, Any]], key: str, label: str, color: int, dashes: int = 0) -> Series:
    found = [line for line in lines if key in line["eval"]]
    steps, values = [line["step"] for line in found], [float(line["eval"][key]) for line in found]
    return Series(label=label, steps=steps, values=values, color=color, is_sparse=True, dashes=dashes)


def _less_empty(plot: Plot) -> Plot:
    kept = [series for series in plot.series if len(series.steps)]
    return Plot(**{**vars(plot), "series": kept})
