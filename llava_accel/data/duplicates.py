"""Records that share an id. They can be trained on, as LLaVA's own mixture is, but no report can tell them apart."""

import hashlib
import json

import numpy as np

from llava_accel.data.corpus import Corpus
from llava_accel.data.mapped_table import Table
from llava_accel.data.problems import DataError
from llava_accel.data.records import record_id


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
