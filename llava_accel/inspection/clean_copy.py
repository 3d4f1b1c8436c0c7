"""A copy of the data without the records that cannot be used, and the list of what it leaves out.

Records may share an id. They can be trained on, as LLaVA's own mixture is, but no report can tell them apart: in the
copy each has its own.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus, Source
from llava_accel.data.records import record_id
from llava_accel.data.row_forms import RowForm, column
from llava_accel.data.survey import Survey
from llava_accel.exceptions import UserError
from llava_accel.recipe import DataTable
from llava_accel.recipe.toml import toml_value
from llava_accel.sources.problems import DataError

_LIST = "left_out.txt"


class CleanCopy:
    """The usable records of data.train and data.eval as JSON lines, with left_out.txt, the reason for each of the others.

    A record with the id of an earlier one gets its own, and is listed in renamed.txt. Images are not copied.

    Args:
        folder: A new one, or one of an earlier copy, which is overwritten.

    Raises:
        UserError: there is something else in it.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_dir() and any(folder.iterdir()) and not (folder / _LIST).is_file():
            raise UserError(f"--fix {folder}: the folder holds other files. Name a new one")
        self._folder = folder
        self._left_out: list[str] = []
        self._renamed: list[str] = []
        self._written: dict[str, list[tuple[Path, Source]]] = {}

    def add(self, name: str, corpus: Corpus, survey: Survey, repeated: dict[int, DataError], console: Console) -> None:
        """Copy data.train or data.eval.

        Raises:
            UserError: none of its records can be used, so that the copy would be empty; or the copy would overwrite it.
        """
        if not len(survey.usable):
            raise UserError(
                f"--fix {self._folder}: no record of {name} can be used. Correct the first ones, and see if others go"
            )
        folder = self._folder / "eval" if name == "data.eval" else self._folder
        written = self._written[name] = _write(folder, corpus, survey, repeated)
        self._left_out += [f"{error}\n" for error in survey.errors.values()]
        renamed = [f"{error}\n" for row, error in repeated.items() if row not in survey.errors]
        self._renamed += renamed
        (self._folder / _LIST).write_text("".join(self._left_out))
        (self._folder / "renamed.txt").write_text("".join(self._renamed))
        left_out = f"{len(survey.errors):,} left out, in {_LIST}; {len(renamed):,} with a new id, in renamed.txt"
        files = ", ".join(str(path) for path, _ in written)
        console.line(f"clean copy of {name}: {files} ({len(survey.usable):,} records; {left_out})")

    def overrides(self, data: DataTable) -> list[str]:
        """What makes a recipe with this [data] use the copy, its images where they are."""
        if not self._written:
            return []
        first = next(iter(self._written.values()))[0][1]
        images = Path(data.images) if data.images else first.images
        words = [f"{name}={_value(written, images)}" for name, written in self._written.items()]
        return words if data.images else [*words, f"data.images={images}"]


def _value(written: list[tuple[Path, Source]], images: Path) -> str:
    """What data.train or data.eval becomes."""
    path, source = written[0]
    if len(written) == 1 and source.images == images and source.weight == 1:
        return str(path)
    return toml_value([{"path": str(to), "images": str(of.images), "weight": of.weight} for to, of in written])


def _write(folder: Path, corpus: Corpus, survey: Survey, repeated: dict[int, DataError]) -> list[tuple[Path, Source]]:
    """A file for each source that has something left, in the order of the sources."""
    folder.mkdir(parents=True, exist_ok=True)
    names = Counter[str]()
    written: list[tuple[Path, Source]] = []
    start = 0
    for source in corpus.sources:
        stem = source.table.path.stem
        names[stem] += 1
        target = folder / (f"{stem}.jsonl" if names[stem] == 1 else f"{stem}-{names[stem]}.jsonl")
        if any(target.resolve() == each.table.path.resolve() for each in corpus.sources):
            raise UserError(f"--fix {folder}: {target} is the data itself. Name another folder")
        rows = range(start, start + len(source))
        start = rows.stop
        if all(row in survey.errors for row in rows):
            continue
        with target.open("wb") as file:
            for row in rows:
                if row not in survey.errors:
                    raw, number = source.whole(row - rows.start), source.number(row - rows.start)
                    file.write((with_own_id(raw, number, corpus.form) if row in repeated else raw) + b"\n")
        written.append((target, source))
    return written


def duplicate_ids(corpus: Corpus) -> dict[int, DataError]:
    """Row -> what is wrong, for every record with the id of an earlier record of the same file.

    Records without an id go by their row, which is unique. Takes eight bytes of memory a record.
    """
    repeated: dict[int, DataError] = {}
    start = 0
    for source in corpus.sources:
        for row, first in _repeated(source, corpus.form).items():
            number = source.number(first)
            error = DataError(
                "duplicate_id",
                f"row {number} has the same id",
                "Give each record its own id, as --fix does: reports and predictions name records by their ids",
            )
            repeated[start + row] = corpus.locate(error, start + row)
        start += len(source)
    return repeated


def with_own_id(raw: bytes, number: int, form: RowForm) -> bytes:
    """The record under a unique id: the old one and the number of its row."""
    fields = json.loads(raw)
    name = f"{record_id(raw, form)}-row{number}"
    return json.dumps(fields | {column(form, "id"): name}, ensure_ascii=False).encode()


def _repeated(source: Source, form: RowForm) -> dict[int, int]:
    """Row -> the first row with its id, for all but the first."""
    keys = np.fromiter((_key(record_id(source.raw(row), form)) for row in range(len(source))), np.int64, len(source))
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    repeated: dict[int, int] = {}
    for place in np.flatnonzero(same & (keys[order[1:]] != 0)):
        before, row = int(order[place]), int(order[place + 1])
        repeated[row] = repeated.get(before, before)
    return dict(sorted(repeated.items()))


def _key(name: str | None) -> int:
    if name is None:
        return 0
    digest = hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
