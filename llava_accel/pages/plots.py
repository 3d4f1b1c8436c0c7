"""Draws plots: values over steps, shares of a whole and histograms, as SVG that takes its colours from the page."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from llava_accel.pages.html import visible

_WIDTH, _HEIGHT = 4.8, 2.9  # inches, of 72 px
_LINE = 0.22  # inches of a legend's line; what it has more than two of makes the plot higher
_MOST_POINTS = 600
_LEGEND = 52  # characters side by side
_WIDE_RANGE = 8.0  # highest by lowest, from which on a logarithmic scale shows more
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))

INK, _FAINT = "#010101", "#010102"
_VARIABLES = {INK: "--ink-soft", _FAINT: "--rule", **{f"#0102{n:02x}": f"--series-{n}" for n in range(8)}}
SERIES = tuple(f"#0102{n:02x}" for n in range(8))
"""Colours of series: 0 training, 1 evaluation, 2 blind, and so on; on a page of several runs, one a run."""
_MARK: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (2, 3))}
"""Style of lines at a step or a value."""
_STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.5, "text.color": INK,
    "axes.edgecolor": _FAINT, "axes.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": _FAINT, "grid.linewidth": 0.6,
    "xtick.color": INK, "ytick.color": INK, "xtick.major.size": 0, "ytick.major.size": 0,
    "lines.linewidth": 1.7, "lines.solid_capstyle": "round",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a plot."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    color: int = 0
    is_sparse: bool = False
    """Few points that each count, as of evaluations: marked. Others are smoothed, and drawn over their raw values."""
    is_exact: bool = False
    """No noise in it: not smoothed."""
    dashes: int = 0
    """0 solid, 1 dashed, 2 dotted: for lines that may coincide."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot of something over steps."""

    title: str
    note: str
    series: list[Series]
    is_percent: bool = False
    """Shares of 1, shown in percent and from zero."""
    is_log: bool = False
    from_zero: bool = False
    level: float | None = None
    """A horizontal line, such as a limit."""
    steps: dict[str, int] = field(default_factory=dict)
    """Vertical lines: label -> step."""

    @property
    def svg(self) -> Markup:
        def draw(axes: Axes) -> None:
            for series in self.series:
                _line(axes, series)
            _scales(axes, self)
            for label, step in self.steps.items():
                axes.axvline(step, **_MARK)
                place = (step, 1.0)
                axes.annotate(label, place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8.5)
            if len(self.series) > 1 or self.steps:
                _legend(axes, 1.07 if self.steps else 1.01, 3)

        labels = _labels([series.label for series in self.series])
        lines = math.ceil(len(labels) / _columns(labels, 3))
        return drawn(self.title, _HEIGHT + _LINE * max(0, lines - 2), draw)


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Parts of a whole as one bar."""

    title: str
    note: str
    parts: dict[str, float]

    @property
    def svg(self) -> Markup:
        def draw(axes: Axes) -> None:
            whole, start = sum(self.parts.values()), 0.0
            for number, (label, part) in enumerate(self.parts.items()):
                share = part / whole
                axes.barh(
                    [0], [share], left=start, height=0.5, color=SERIES[number], label=f"{label} {100 * share:.0f} %"
                )
                start += share
            axes.set_axis_off()
            axes.set_xlim(0, 1)
            axes.set_ylim(-0.4, 0.4)
            _legend(axes, 1.0, 2 if len(self.parts) > 3 else 1)

        return drawn(self.title, _HEIGHT * 0.68, draw)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of the values between each two edges."""

    title: str
    note: str
    edges: Sequence[float]
    counts: Sequence[int]
    unit: str
    level: float | None = None
    """A vertical line, such as a limit."""

    @property
    def svg(self) -> Markup:
        def draw(axes: Axes) -> None:
            edges = np.asarray(self.edges, dtype=float)
            axes.bar(edges[:-1], self.counts, width=np.diff(edges), align="edge", color=SERIES[0], linewidth=0)
            if self.level is not None:
                axes.axvline(self.level, **_MARK)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:,.0f}")
            axes.grid(visible=False, axis="x")
            axes.set_xlabel(self.unit)

        return drawn(self.title, _HEIGHT, draw)


def _legend(axes: Axes, height: float, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    labels = _labels(labels)
    columns = _columns(labels, columns)
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, height), ncols=columns, frameon=False, borderaxespad=0,
        handlelength=1.6, columnspacing=1.4, labelcolor=INK,
    )  # fmt: skip


def _labels(labels: Sequence[str]) -> list[str]:
    """Labels without what cannot be seen, and cut: a legend that is wider than its plot leaves no room for the curves."""
    shown = map(str, map(visible, labels))
    return [label if len(label) <= _LEGEND else f"…{label[1 - _LEGEND :]}" for label in shown]


def _columns(labels: Sequence[str], most: int) -> int:
    return max(1, min(most, _LEGEND // (6 + max(map(len, labels), default=0))))


def smoothed(values: Float[np.ndarray, "points"]) -> Float[np.ndarray, "points"]:
    """A running mean over a fortieth of the points, with fewer of them at the two ends; gaps (NaN) stay out of it."""
    width = max(1, len(values) // 40) | 1
    window = np.ones(width)
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), window, mode="same")
    counts = np.convolve(known.astype(float), window, mode="same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _line(axes: Axes, series: Series) -> None:
    steps, values = np.asarray(series.steps, dtype=float), np.asarray(series.values, dtype=float)
    color, dashes = SERIES[series.color % len(SERIES)], _DASHES[series.dashes % len(_DASHES)]
    if series.is_sparse or len(steps) == 1:  # a line of one point would not be seen
        axes.plot(steps, values, color=color, label=series.label, marker="o", markersize=3.6, linestyle=dashes)
        return
    mean = values if series.is_exact else smoothed(values)
    thin = max(1, -(-len(steps) // _MOST_POINTS))
    if len(values) >= 80 and not series.is_exact:  # from here on a mean differs from the values
        axes.plot(steps[::thin], values[::thin], color=color, linewidth=0.7, alpha=0.35)
    axes.plot(steps[::thin], mean[::thin], color=color, label=series.label, linestyle=dashes)


def _scales(axes: Axes, plot: Plot) -> None:
    values = np.concatenate([np.asarray(series.values, dtype=float) for series in plot.series])
    positive = values[np.isfinite(values) & (values > 0)]
    if plot.level is not None and len(positive) and positive.max() > plot.level / 4:  # else it would flatten the curve
        axes.axhline(plot.level, **_MARK)
    if plot.is_log and len(positive) and positive.max() > _WIDE_RANGE * positive.min():
        axes.set_yscale("log")
        # Over many decades the labels between them would overlap.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if positive.max() < 200 * positive.min() else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    elif plot.from_zero or plot.is_percent:
        axes.set_ylim(bottom=0)
    if plot.is_percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    elif len(positive) and positive.max() >= 1000:
        axes.yaxis.set_major_formatter("{x:,.0f}")
    elif len(positive) and positive.max() < 0.01:
        axes.yaxis.set_major_formatter(lambda value, position: _scientific(value))
    steps = {step for series in plot.series for step in series.steps}
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6) if len(steps) > 1 else FixedLocator(list(steps)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("step")


def _scientific(value: float) -> str:
    """0.00015 -> 1.5e-4."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def drawn(title: str, height: float, draw: Callable[[Axes], None]) -> Markup:
    """An `<svg>` element of `height` inches, filled by `draw`.

    The same drawing gives the same text, and its ids differ from those of any other title.
    """
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": title}
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # matplotlib's own rule is for `*`, which in a page is everything.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    slug = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'\bid="', f'id="{slug}-', svg)
    svg = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{slug}-", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return Markup(svg.replace("<svg", Markup('<svg role="img" aria-label="{}"').format(title), 1))
