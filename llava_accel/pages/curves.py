"""Chooses the curves of a page: of one run, or of several on top of each other. plots.py draws them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from llava_accel.pages.history import History
from llava_accel.pages.plots import SERIES, Histogram, Plot, Series, Shares
from llava_accel.scoring.metrics import score_names, score_title

_LOSSES = {
    "answers": "Cross-entropy per target token, in nats, over all ranks.",
    "dpo": "Loss of the preference, a mean over pairs; with the usual loss, 0.693 means no preference.",
}


def capital(text: str) -> str:
    """The text with a capital at its start and the rest as it is."""
    return text[:1].upper() + text[1:]


def curves(run: History) -> list[Plot | Shares]:
    """The plots of one run; those without data are left out."""
    steps, evaluations, chosen = run.steps, run.evaluations, run.chosen
    mark = "best" if run.recipe.checkpoint.best else "last"
    marks = {mark: chosen["step"]} if chosen and len(evaluations) > 2 else {}
    parts = sorted({key for line in steps for key in line if key.startswith("learning_rate/")}) or ["learning_rate"]
    rates = [
        # Rates of several parts often coincide.
        _series(steps, key, key.rpartition("/")[2].replace("_", " "), n, is_exact=True, dashes=n)
        for n, key in enumerate(parts)
    ]
    limit = run.recipe.optim.max_grad_norm
    plots = [
        Plot(
            title="Loss",
            note=_loss_note(run),
            series=[_series(steps, "loss", "training"), _series(evaluations, "loss", "evaluation", 1)],
            is_log=True,
            steps=marks,
        ),
        Plot(
            title="Score",
            note="On the held-out data. Blind is the same model with the images blanked.",
            series=_scores(run),
            is_percent=True,
            steps=marks,
        ),
        *_measures(run),
        Plot(title="Learning rate", note="The rate of each part that is trained.", series=rates),
        Plot(
            title="Gradient norm",
            note=f"Norm of the whole gradient{f', before it is clipped to {limit:g}' if limit else ''}.",
            series=[_series(steps, "grad_norm", "gradient norm")],
            is_log=True,
            level=limit or None,
        ),
        Plot(
            title="Tokens a second",
            note="Of all ranks; image tokens count, padding does not.",
            series=[_series(steps, "tokens_per_s", "tokens a second", 3)],
            from_zero=True,
        ),
    ]
    return [*_with_data(plots), *_times(run)]


def compared_curves(runs: Sequence[History], titles: Sequence[str]) -> list[Plot]:
    """Loss, scores and speed of several runs, one colour a run."""
    named = list(zip(runs, titles, strict=True))

    def trained(key: str) -> list[Series]:
        return [_series(run.steps, key, title, n) for n, (run, title) in enumerate(named)]

    def evaluated(key: str) -> list[Series]:
        return [_series(run.evaluations, key, title, n) for n, (run, title) in enumerate(named)]

    note = (
        _loss_note(runs[0])
        if have_one_loss(runs)
        else "Each run's own loss: they learn different things, or weigh them differently."
    )
    scores = [
        Plot(title=capital(score_title(score)), note="On the held-out data.", series=evaluated(score), is_percent=True)
        for score in score_names({key for run in runs for line in run.evaluations for key in line["eval"]})
    ]
    plots = [
        Plot(title="Training loss", note=note, series=trained("loss"), is_log=True),
        Plot(title="Evaluation loss", note=f"{note} Held-out data.", series=evaluated("loss"), is_log=True),
        *scores,
        Plot(title="Tokens a second", note="Over all ranks.", series=trained("tokens_per_s"), from_zero=True),
    ]
    return _with_data(plots)


def have_one_loss(runs: Sequence[History]) -> bool:
    """Whether the losses of these runs measure the same, so that a lower one is a better one."""
    learned = [(run.recipe.train.objective, run.recipe.preference) for run in runs]
    return all(each == learned[0] for each in learned[1:])


def _loss_note(run: History) -> str:
    return _LOSSES.get(run.recipe.train.objective, f"{capital(run.recipe.loss_unit)}.")


def length_plots(run: History) -> list[Histogram]:
    """Histograms of the lengths of the records of the training and of the held-out data."""
    limit, plots = float(run.recipe.data.max_length), list[Histogram]()
    for key, name in (("train", "training"), ("eval", "held-out")):
        if lengths := (run.figures.get(key) or {}).get("lengths"):
            is_near = lengths["edges"][-1] > limit / 2
            line = " The line is data.max_length." if is_near else ""
            plots.append(
                Histogram(
                    title=f"Lengths of the {name} data",
                    note=f"Records by their tokens, image tokens included.{line}",
                    edges=lengths["edges"],
                    counts=lengths["counts"],
                    unit="tokens",
                    level=limit if is_near else None,
                )
            )
    return plots


def _scores(run: History) -> list[Series]:
    """The main score and its blind one; the other scores where their values differ from it."""
    main, lines = run.score or "exact_match", run.evaluations
    names = score_names({key for line in lines for key in line["eval"]})
    series = [_series(lines, main, score_title(main), 1), _series(lines, f"blind_{main}", "blind", 2, dashes=1)]
    for number, other in enumerate((key for key in names if key != main), start=3):
        pairs = [(line["eval"][main], line["eval"][other]) for line in lines if {main, other} <= line["eval"].keys()]
        if any(abs(one - another) > 5e-4 for one, another in pairs):
            series.append(_series(lines, other, score_title(other), number, dashes=number // len(SERIES)))
    return series


def _measures(run: History) -> list[Plot]:
    """Plots of what the objective measures besides its loss: in lines of training these keys come right after it."""
    keys = list(run.steps[0]) if run.steps else []
    own = keys[keys.index("loss") + 1 : keys.index("learning_rate")] if "learning_rate" in keys else []
    if run.recipe.train.objective != "dpo":
        return [Plot(title=key, note="A mean over steps.", series=_both(run, key)) for key in own]
    pairs = ("chosen", "rejected")
    return [
        Plot(
            title="Reward margin",
            note="By how much a chosen answer has gained more than the rejected one, times preference.beta.",
            series=_both(run, "reward_margin"),
        ),
        Plot(
            title="Log-probability",
            note="Log-probability of whole answers, in training. Both may fall; their distance counts.",
            series=[_series(run.steps, f"{which}_log_prob", which, n) for n, which in enumerate(pairs)],
        ),
        Plot(
            title="Distance to the reference",
            note="Mean gain of log-probability per token of both answers: how far the model has moved.",
            series=_both(run, "kl"),
        ),
    ]


def _both(run: History, key: str) -> list[Series]:
    """A value in training and in evaluations."""
    return [_series(run.steps, key, "training"), _series(run.evaluations, key, "evaluation", 1)]


def _times(run: History) -> list[Shares]:
    """The shares of the time by phase, if the run's lines have them; phases below a fiftieth are part of "other"."""
    seconds = run.seconds
    whole = sum(seconds.values())
    named = [(name, part) for name, part in seconds.items() if name != "other" and part > 0.02 * whole]
    if not named:
        return []
    largest = sorted(named, key=lambda pair: -pair[1])[: len(SERIES) - 1]
    parts = {name.replace("_", " "): float(part) for name, part in largest}
    parts["other"] = max(0.0, whole - sum(parts.values()))
    note = (
        "On the main process, up to the last step. Data is read while the steps run; only the time that they wait for it "
        "counts."
    )
    return [Shares(title="Where the time went", note=note, parts=parts)]


def _series(lines: Sequence[dict[str, Any]], key: str, label: str, color: int = 0, **style: Any) -> Series:
    """The values of `key` in lines of training or of evaluations; the latter are few, and each counts."""
    points = [(line["step"], float(values[key])) for line in lines if key in (values := line.get("eval", line))]
    is_sparse = any("eval" in line for line in lines)
    steps, values = [step for step, _ in points], [value for _, value in points]
    return Series(label=label, steps=steps, values=values, color=color, is_sparse=is_sparse, **style)


def _with_data(plots: Iterable[Plot]) -> list[Plot]:
    reduced = [replace(plot, series=[series for series in plot.series if series.steps]) for plot in plots]
    return [plot for plot in reduced if plot.series]
