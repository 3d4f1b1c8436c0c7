"""Makes one HTML file of what a page shows: templates, escaping, and a page that cannot reach any network.

Every text that comes from a data set, a model or a recipe goes through `visible` and then through the escaping that is
on for all templates. Besides, the page forbids the browser every script but its own, by hash, and every address.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llava_accel.storage.atomic import atomic_file

# Control characters, surrogates on their own, characters without width, and marks that turn the direction of the text
# beside them. White space and the joiners that Persian, Hindi and emoji need stay.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


class Live(NamedTuple):
    """What is added to a page that is served while its runs go on."""

    version: str
    """Changes when the page would."""
    links: Sequence[tuple[str, str]]
    """Address and title of the pages beside it."""
    notes: Sequence[str]


PERCENT = "\u00a0%"
"""A percent sign that stays with its number."""


def visible(value: object) -> object:
    """Text with escapes in place of characters that are not seen and could change what is seen; all else as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), value)


def render(template: str, context: Mapping[str, object], live: Live | None = None) -> str:
    """A page as HTML; with `live`, one that reloads itself when there is more to show."""
    script = _source("page.js") + (_source("watch.js") if live else "")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    frame = {
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "style": Markup(_source("page.css")),
        "live": live,
    }
    return _environment().get_template(template).render(**context, **frame)


def write_page(path: Path, html: str) -> None:
    """Write a page in one go, so that a browser never reads half of it.

    Raises:
        OSError: the folder cannot be written.
    """
    with atomic_file(path) as unfinished:
        unfinished.write_text(html, encoding="utf-8")


def percent(share: int | float) -> str:
    """0.123 -> "12.3 %", which no line break divides."""
    return f"{100 * share:.1f}{PERCENT}"


def count(number: int | float) -> str:
    """7.0 -> "7", 2.5 -> "2.5"."""
    return f"{number:,.0f}" if float(number).is_integer() else f"{number:g}"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llava_accel.pages", "templates"),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count)
    return environment


@functools.cache
def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
