"""A copy of the data without the records that cannot be used, and the list of what it leaves out.

Records may share an id. They can be trained on, as LLaVA's own mixture is, but no report can tell them apart: in the
copy each has its own.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus
from llava_accel.data.mapped_table import Table
from llava_accel.data.problems import DataError
from llava_accel.data.records import record_id
from llava_accel.data.survey import Survey
from llava_accel.exceptions import UserError


def write_clean_copy(
    folder: Path, corpus: Corpus, survey: Survey, repeated: dict[int, DataError], console: Console
) -> None:
    """The usable records as JSON lines, and left_out.txt with the reason for each of the others.

    A record with the id of an earlier one gets its own, and is listed in renamed.txt. Images are not copied: the copy is
    used with the same data.images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in corpus.sources:
        target = folder / f"{source.table.path.stem}.jsonl"
        if target.exists() and target.resolve() == source.table.path.resolve():
            raise UserError(f"--fix {folder}: {target} is the data itself. Name another folder")
        target.unlink(missing_ok=True)
    start = 0
    for source in corpus.sources:
        with (folder / f"{source.table.path.stem}.jsonl").open("ab") as file:
            for row in range(start, start + len(source.table)):
                if row not in survey.errors:
                    raw = corpus.raw(row)
                    file.write((with_own_id(raw, source.table.number(row - start)) if row in repeated else raw) + b"\n")
        start += len(source.table)
    (folder / "left_out.txt").write_text("".join(f"{error}\n" for error in survey.errors.values()))
    renamed = [f"{error}\n" for row, error in repeated.items() if row not in survey.errors]
    (folder / "renamed.txt").write_text("".join(renamed))
    left_out = f"{len(survey.errors):,} left out, in left_out.txt; {len(renamed):,} with a new id, in renamed.txt"
    console.line(f"clean copy: {folder} ({len(survey.usable):,} records; {left_out})")


def duplicate_ids(corpus: Corpus) -> dict[int, DataError]:
    """Row -> what is wrong, for every record with the id of an earlier record of the same file.

    Records without an id go by their row, which is unique. Takes eight bytes of memory a record.
    """
    repeated: dict[int, DataError] = {}
    start = 0
    for source in corpus.sources:
        for row, first in _repeated(source.table).items():
            number = source.table.number(first)
            error = DataError(
                "duplicate_id",
                f"row {number} has the same id",
                "Give each record its own id, as --fix does: reports and predictions name records by their ids",
            )
            repeated[start + row] = corpus.locate(error, start + row)
        start += len(source.table)
    return repeated


def with_own_id(raw: bytes, number: int) -> bytes:
    """The record under a unique id: the old one and the number of its row."""
    fields = json.loads(raw)
    return json.dumps(fields | {"id": f"{record_id(raw)}-row{number}"}, ensure_ascii=False).encode()


def _repeated(table: Table) -> dict[int, int]:
    """Row -> the first row with its id, for all but the first."""
    keys = np.fromiter((_key(record_id(table[row])) for row in range(len(table))), np.int64, len(table))
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
