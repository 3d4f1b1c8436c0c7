"""A table with a header -> records: one question or image a row, several images and annotators in several columns."""

import csv
import difflib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from llava_accel.converters.csv_text import find_delimiter, read_text, take_excels_line
from llava_accel.converters.entry import Rows, make_record, placed
from llava_accel.converters.faults import Part
from llava_accel.data.images import find_image
from llava_accel.sources.problems import DataError, quoted


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of a table's columns, by what they hold.

    Args:
        images: Each is one `<image>` of a row in which its cell is not blank.
        question: Empty: `asked` is the question of all rows.
        answers: Each is one annotator of a row in which its cell is not blank.
    """

    images: Sequence[str] = ("image",)
    question: str = "question"
    answers: Sequence[str] = ("answer",)
    asked: str = ""

    @property
    def all(self) -> list[str]:
        """All these names."""
        return [*self.images, *([self.question] if self.question else []), *self.answers]


def csv_part(
    file: Path,
    images: Path,
    columns: Columns,
    *,
    out: Path,
    say: Callable[[str], None],
    encoding: str = "",
    delimiter: str = "",
    suffix: str = "",
) -> Part:
    """The rows of a table.

    Args:
        images: The folder that image names are relative to.
        say: Called with lines on how the file is read.
        encoding, delimiter: Empty: they are detected.
        suffix: The line below each question; empty: none.

    Raises:
        UserError: with file, line and remedy.
    """
    if not images.is_dir():
        raise DataError("missing_image", f"there is no folder {images}", "Check --images")
    text, known, note = read_text(file, encoding)
    text, named = take_excels_line(text)
    between = delimiter or named or find_delimiter(text, columns.all)
    say(f"{file}: encoding {known}, delimiter {between!r}")
    if note:
        say(f"note: {note}")
    lines = _lines(file, text, between, num_before=1 if named else 0)
    _, header = next(lines, (0, []))
    header = [name.strip() for name in header]
    _check_header(file, header, columns, between)
    notes: list[str] = []
    rows = _rows(file, lines, header, columns, images, suffix, notes)
    return Part(out=out, rows=rows, source=str(file), notes=notes)


def _lines(file: Path, text: str, delimiter: str, num_before: int) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with the line of the file in which each begins; DataError if it is not CSV."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1 + num_before
        try:
            row = next(reader, None)
        except csv.Error as error:
            remedy = 'Check the quotes in this row: an unclosed one takes in all that follows; inside quotes, write ""'
            raise DataError("json", f"not well-formed CSV ({error})", remedy, file=str(file), row=start) from None
        if row is None:
            return
        # Outside of `try`: where a wrong header ends the program here, modules may be gone when `except` is looked at.
        if any(cell.strip() for cell in row):
            yield start, row


def _check_header(file: Path, header: Sequence[str], columns: Columns, delimiter: str) -> None:
    missing = [name for name in columns.all if name not in header]
    if missing:
        folded = {name.casefold(): name for name in header if name}
        similar = (difflib.get_close_matches(name.casefold(), folded, n=1) for name in missing)
        guesses = list(dict.fromkeys(folded[one[0]] for one in similar if one))
        guess = f"Did you mean {' and '.join(map(repr, guesses))}? " if guesses else ""
        without = " (or --question TEXT for all rows)" if columns.question in missing else ""
        raise DataError(
            "fields",
            f"there is no column {', '.join(map(repr, missing))} among {', '.join(quoted(name) for name in header)}",
            f"{guess}Name the columns with --image-column, --question-column{without} and --answer-column, "
            f"and the character between cells with --delimiter if it is not {delimiter!r}",
            file=str(file),
            row=1,
        )
    if twice := [name for name, count in Counter(header).items() if count > 1 and name in columns.all]:
        raise DataError("fields", f"the column {twice[0]!r} is there twice", "Rename one", file=str(file), row=1)


def _rows(
    file: Path,
    lines: Iterator[tuple[int, list[str]]],
    header: Sequence[str],
    columns: Columns,
    images: Path,
    suffix: str,
    notes: list[str],
) -> Rows:
    translated = 0
    for number, (start, row) in enumerate(lines, start=1):
        try:
            if any(cell.strip() for cell in row[len(header) :]):
                problem = f"the row has {len(row)} cells, and the header {len(header)}"
                raise DataError("fields", problem, "Put text with the delimiter in it in quotes")
            cells = dict(zip(header, (cell.strip() for cell in row), strict=False))
            written = _filled(cells, columns.images)
            names = [_image(images, name) for name in written]
            translated += sum("\\" in before and "\\" not in name for before, name in zip(written, names, strict=True))
            yield make_record(
                record_id=f"{file.stem}-{number}",
                images=names,
                question=columns.asked or _filled(cells, [columns.question])[0],
                answers=Counter(_filled(cells, columns.answers)),
                suffix=suffix,
            )
        except DataError as error:
            yield placed(error, file, row=start)
    if translated:
        notes.append(f"{translated:,} image names with \\ were written with /")


def _filled(cells: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """The cells of some columns that are not blank; DataError if all are."""
    filled = [cell for name in names if (cell := cells.get(name, ""))]
    if not filled:
        problem = f"the column {names[0]!r} is blank" if len(names) == 1 else f"the columns {list(names)} are blank"
        raise DataError("empty", problem, "Fill it in, or remove the row")
    return filled


def _image(folder: Path, name: str) -> str:
    """An image's name in the one form that all rows use for it; DataError if there is no such file."""
    name = str(PurePosixPath(name))
    try:
        find_image(folder, name)
    except DataError as error:
        # Windows writes a\b.jpg for a/b.jpg.
        plain = name.replace("\\", "/")
        if plain != name and (folder / plain).is_file():
            return _image(folder, plain)
        raise replace(error, remedy=error.remedy.replace("data.images", "--images")) from None
    return name
