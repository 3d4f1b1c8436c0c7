"""The one error that a user's data can raise: what is wrong, where, and what to do about it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llava_accel.exceptions import UserError

Kind = Literal[
    "json", "fields", "roles", "empty", "image_count", "unsafe_path", "missing_image", "broken_image", "too_long",
    "duplicate_id", "blank_answer", "pair", "reader", "left_out",
]  # fmt: skip


@dataclass(eq=False)  # compared and hashed by identity, as exceptions are
class DataError(UserError):
    """A record, or the file that holds it, cannot be used.

    Args:
        kind: The class that summaries count it under.
        problem: What is wrong, with the offending value.
        remedy: What the user can do.
        file, row, id: Where it is; `row` counts from 1, as editors do. Filled in by `at`.
        tokens: Length of a record that is too long, else 0.
    """

    kind: Kind
    problem: str
    remedy: str
    file: str = ""
    row: int | None = None
    id: str | None = None
    tokens: int = 0

    def at(self, file: str, row: int, record_id: str | None) -> "DataError":
        """The same error with file, row and id, which code that works on a single record does not know."""
        return replace(self, file=file, row=row, id=record_id)

    def with_note(self, note: str) -> "DataError":
        """The same error with one more sentence after its remedy."""
        return replace(self, remedy=f"{self.remedy}. {note}")

    def __str__(self) -> str:
        place = self.file if self.file.isprintable() else quoted(self.file, 200)
        if self.row is not None:
            place += f", row {self.row}"
        if self.id is not None:
            place += f" (id {quoted(self.id)})"
        return f"{place}: {self.problem}. {self.remedy}" if place else f"{self.problem}. {self.remedy}"

    def __reduce__(self) -> tuple[type["DataError"], tuple[str | int | None, ...]]:
        # Exceptions pickle through `args`, which a dataclass does not fill; loader workers send errors by pickle.
        return DataError, (self.kind, self.problem, self.remedy, self.file, self.row, self.id, self.tokens)


def quoted(text: object, limit: int = 80) -> str:
    """`text` in quotes, at most `limit` characters, with control characters escaped: data must not control a terminal."""
    shown = str(text)
    return repr(shown if len(shown) <= limit else shown[: limit - 1] + "…")


def some(items: Sequence[object], limit: int = 4) -> str:
    """The first few of many, and how many more there are, for an error message."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more
