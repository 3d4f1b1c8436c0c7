"""matplotlib drawings as SVG that stands in a page and takes its colours from it.

matplotlib is given stand-in colours that no one would choose; in the SVG they become CSS variables, so that one drawing
is right in light and in dark mode. Text stays text, in the page's font.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, _FAINT = "#010101", "#010102"
_VARIABLES = {INK: "--ink-soft", _FAINT: "--rule", **{f"#0102{n:02x}": f"--series-{n}" for n in range(8)}}
SERIES = tuple(f"#0102{n:02x}" for n in range(8))
"""Colours of series: 0 training, 1 evaluation, 2 blind, and so on; on a page of several runs, one a run."""
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}
_WIDTH = 4.8  # inches, of 72 px


def drawn(title: str, height: float, draw: Callable[[Axes], None]) -> Markup:
    """An `<svg>` element of `height` inches, filled by `draw`.

    The same drawing gives the same text, and no id of it occurs under another title.
    """
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _in_page(buffer.getvalue(), title)


def _in_page(svg: str, title: str) -> Markup:
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
