"""A copy of the data without the records that cannot be used, and the list of what it leaves out.

Records may share an id. They can be trained on, as LLaVA's own mixture is, but no report can tell them apart: in the
copy each has its own.
"""

import json
from itertools import count
from pathlib import Path

from llava_accel.console.output import Console, printable
from llava_accel.data.corpus import Corpus, Source
from llava_accel.data.records import record_id
from llava_accel.data.row_forms import RowForm, column
from llava_accel.data.survey import Survey
from llava_accel.exceptions import UserError
from llava_accel.inspection.data_facts import Checked
from llava_accel.inspection.repeated_ids import repeated_id
from llava_accel.recipe import DataTable
from llava_accel.recipe.toml import toml_value

_LIST = "left_out.txt"


class CleanCopy:
    """The usable records of data.train and data.eval as JSON lines, with left_out.txt, the reason for each of the others.

    A record with the id of an earlier one gets its own, and is listed in renamed.txt. Images are not copied.

    Args:
        folder: A new one, or one of an earlier copy, which is overwritten.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / _LIST).is_file():
            raise UserError(f"--fix {folder}: the folder holds other files. Name a new one")
        self._folder = folder
        self._left_out: list[str] = []
        self._renamed: list[str] = []
        self._written: dict[str, list[tuple[Path, Source]]] = {}

    def add(self, checked: Checked, console: Console) -> None:
        """Copy data.train or data.eval.

        Raises:
            UserError: none of its records can be used, so that the copy would be empty; or it would overwrite the data.
        """
        name, corpus, survey = checked.name, checked.corpus, checked.survey
        if not len(survey.usable):
            raise UserError(
                f"--fix {self._folder}: no record of {name} can be used. Correct the first ones, and check again"
            )
        folder = self._folder / "eval" if name == "data.eval" else self._folder
        written = self._written[name] = _write(folder, corpus, survey, set(checked.repeated))
        self._left_out += [f"{error}\n" for error in survey.errors.values()]
        renamed = [f"{repeated_id(corpus, row, first)}\n" for row, first in checked.repeated.items()]
        self._renamed += renamed
        for file, lines in ((_LIST, self._left_out), ("renamed.txt", self._renamed)):
            (self._folder / file).write_text(printable("".join(lines)), encoding="utf-8")
        left_out = f"{len(survey.errors):,} left out, in {_LIST}; {len(renamed):,} with a new id, in renamed.txt"
        files = ", ".join(str(path) for path, _ in written)
        console.line(f"clean copy of {name}: {files} ({len(survey.usable):,} records; {left_out})")

    def overrides(self, data: DataTable) -> list[str]:
        """The overrides that make a recipe with this [data] use the copy, with images where they are."""
        if not self._written:
            return []
        first = next(iter(self._written.values()))[0][1]
        images = Path(data.images) if data.images else first.images
        words = [f"{name}={_value(written, images)}" for name, written in self._written.items()]
        return words if data.images else [*words, f"data.images={images}"]


def _value(written: list[tuple[Path, Source]], images: Path) -> str:
    """The new value of data.train or data.eval."""
    path, source = written[0]
    if len(written) == 1 and source.images == images and source.weight == 1:
        return str(path)
    return toml_value([{"path": str(to), "images": str(of.images), "weight": of.weight} for to, of in written])


def _write(folder: Path, corpus: Corpus, survey: Survey, repeated: set[int]) -> list[tuple[Path, Source]]:
    """Write a file for each source that has records left, in the order of the sources."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = set[str]()
    written: list[tuple[Path, Source]] = []
    for source, rows in zip(corpus.sources, corpus.ranges, strict=True):
        stem = source.table.path.stem
        names = (f"{stem}-{number}" if number > 1 else stem for number in count(1))
        taken.add(name := next(name for name in names if name not in taken))
        target = folder / f"{name}.jsonl"
        if any(target.resolve() == each.table.path.resolve() for each in corpus.sources):
            raise UserError(f"--fix {folder}: {target} is the data itself. Name another folder")
        if all(row in survey.errors for row in rows):
            continue
        with target.open("wb") as file:
            for row in rows:
                if row not in survey.errors:
                    raw, number = source.whole(row - rows.start), source.number(row - rows.start)
                    file.write((with_own_id(raw, number, corpus.form) if row in repeated else raw) + b"\n")
        written.append((target, source))
    return written


def with_own_id(raw: bytes, number: int, form: RowForm) -> bytes:
    """The record under a unique id: the old one and the number of its row."""
    fields, known = json.loads(raw), record_id(raw, form)
    name = f"row{number}" if known is None else f"{known}-row{number}"
    return json.dumps(fields | {column(form, "id"): name}, ensure_ascii=False).encode()
