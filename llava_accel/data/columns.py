"""Column names: those that data.columns gives, and a proposal where the names of a row belong to no known form."""

import difflib
import json
from collections.abc import Iterable, Mapping

from llava_accel.data.messages import IMAGE_FIELDS, Fields, present
from llava_accel.recipe.toml import toml_key, toml_value
from llava_accel.sources.image_parts import part_of
from llava_accel.sources.problems import DataError, quoted, some

Columns = tuple[tuple[str, str], ...]
"""data.columns: our name of a field, and the user's."""
_MOST_COLUMNS = 1000  # names that a message chooses from
_LIKELY = {
    "image": ("image", "img", "photo", "picture", "file", "path", "url"),
    "question": ("question", "prompt", "query", "instruction", "ask", "user", "problem", "input"),
    "answer": ("answer", "label", "response", "output", "target", "reply", "assistant", "caption", "text"),
}  # fmt: skip
"""Names that other data sets use for these fields, the likeliest first."""


def value_at(fields: Fields, name: str, missing: object = None) -> object:
    """The value of a column; dots lead into nested ones. `missing` where there is none."""
    if name in fields:
        return fields[name]
    head, _, rest = name.partition(".")
    inner = fields.get(head)
    return value_at(inner, rest, missing) if rest and isinstance(inner, Mapping) else missing


def _has_column(fields: Fields, name: str) -> bool:
    """Whether a row has a column, even if its value is null."""
    return value_at(fields, name, missing := object()) is not missing


def check_columns(rows: Iterable[bytes], columns: Columns) -> None:
    """Read rows until each column that data.columns names has occurred; nearly always the first row has them all.

    Raises:
        DataError: no row has one of these columns.
    """
    missing, known = dict(columns), dict[str, None]()
    for raw in rows if missing else ():
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError):
            continue  # reported when the row itself is read
        if isinstance(fields, dict):
            missing = {ours: theirs for ours, theirs in missing.items() if not _has_column(fields, theirs)}
            known |= dict.fromkeys(list(fields)[:_MOST_COLUMNS] if len(known) < _MOST_COLUMNS else ())
        if not missing:
            return
    if missing:
        raise _no_such_column(*next(iter(missing.items())), known)


def _no_such_column(ours: str, name: str, known: Iterable[str]) -> DataError:
    names = list(known)
    similar = difflib.get_close_matches(name, names, n=1)
    remedy = (
        f"Did you mean {quoted(similar[0])}?"
        if similar
        else f"The rows have {some([quoted(name, 30) for name in names], 12)}."
    )
    problem = f"data.columns.{ours} is {quoted(name)}, and there is no such column"
    remedy = f"{remedy} Name one of the file's, or remove the key: it holds for data.train and data.eval alike"
    return DataError("fields", problem, remedy)


def unknown(fields: Fields, columns: Columns, forms: Iterable[tuple[str, ...]]) -> DataError:
    """The error of a row that is in none of the forms, with a proposal where its names give one.

    Args:
        forms: The fields by which each form is recognised.
    """
    for ours, theirs in columns:
        if ours not in ("id", "image", "system", "history") and not _has_column(fields, theirs):
            return _no_such_column(ours, theirs, fields)
    if {"data", "annotations"} <= fields.keys():
        remedy = "Export again as JSON-MIN, and name its columns in data.columns"
        return DataError("fields", "the row is in Label Studio's JSON, which nests answers deeply", remedy)
    forms, guesses, theirs = list(forms), _guesses(fields), dict(columns)
    for form in forms:
        given = [name for name in form if present(fields, *(IMAGE_FIELDS if name == "image" else (name,))) is not None]
        nulls = [theirs.get(name, name) for name in form if name not in given]
        is_begun = given and (given != ["image"] or not guesses)
        if is_begun and all(_has_column(fields, name) for name in nulls):
            return DataError("fields", f"{quoted(nulls[0], 30)} is null", "Fill it in, or remove the record")
    names = [quoted(name, 30) for name, value in fields.items() if value is not None]
    problem = f"'conversations' is missing, and the row is in no other form: it has {some(names, 12) or 'no field'}"
    others: dict[str, list[str]] = {}
    for first, *rest in forms:
        others.setdefault(first, []).extend(rest)
    known = ", ".join(" + ".join([first, *filter(None, ["|".join(rest)])]) for first, rest in others.items())
    shown = toml_value(guesses or {"image": "photo", "question": "q", "answer": "label"})
    other = "" if guesses else ", make them with a function of yours (data.reader)"
    return DataError("fields", problem, f"Name the columns, data.columns = {shown}{other}, or write {known}")


def _guesses(fields: Fields) -> dict[str, str]:
    """data.columns for a row whose names resemble ours; empty unless they give a question and its answer, or a caption."""
    names = [name for name, value in fields.items() if _is_text(value) and name == toml_key(name)]
    mapped = {"image": "image"} if present(fields, *IMAGE_FIELDS) is not None else {}
    if images := [name for name in names if part_of(str(fields[name]))]:  # it holds the image itself, whatever its name
        mapped = mapped or {"image": images[0]}
        names = [name for name in names if name not in images]
    for ours, words in _LIKELY.items():
        free = [name for name in names if name not in (*mapped.values(), *IMAGE_FIELDS)]
        free = [name for name in free if ours != "question" or isinstance(fields[name], str)]
        like = (name for word in words for name in free if word in name.lower() or name.lower() == ours[0])
        if ours not in mapped and (name := next(like, None)) is not None:
            mapped[ours] = name
    if "question" not in mapped and "image" in mapped and "answer" in mapped:
        mapped["caption"] = mapped.pop("answer")
    if not ("question" in mapped and "answer" in mapped) and "caption" not in mapped:
        return {}
    return {ours: name for ours, name in mapped.items() if ours != name}


def _is_text(value: object) -> bool:
    """Whether a value may be a question or an answer: a text, or a list of several answers."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
    )
