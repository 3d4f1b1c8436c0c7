"""A survey on disk, keyed by files, template, tokenizer and settings, so that a second start reads no record.

Its columns are mapped into memory: what ten million rows take is shared by all ranks and workers of a machine.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from llava_accel.data.corpus import Corpus
from llava_accel.data.images import check_pictures
from llava_accel.data.problems import DataError
from llava_accel.data.survey import COLUMNS, Survey, read_rows
from llava_accel.data.whole_file import whole_file

_FORMAT = 3
_OF_PICTURES = ("missing_image", "broken_image", "unsafe_path")


def cached_survey(corpus: Corpus, key: str, cache_dir: Path, read: Callable[[], Survey]) -> Survey:
    """The survey of an earlier start with the same data and settings, else `read()`, which is then kept.

    Rows whose pictures were missing or broken are read again: pictures get mended without a change to the files.

    Args:
        key: Fingerprint of everything besides the files that decides lengths: tokenizer, template, settings.
    """
    path = cache_dir / "surveys" / f"{corpus.fingerprint()}-{key}-{_FORMAT}.arrow"
    if path.exists():
        return _mended(corpus, _load(path))
    _write(read(), path)
    return _load(path)


def _write(found: Survey, path: Path) -> None:
    errors = json.dumps({row: vars(error) for row, error in found.errors.items()})
    batch = pa.record_batch({name: getattr(found, name) for name in COLUMNS})
    batch = batch.replace_schema_metadata({"errors": errors, "num_dropped_turns": str(found.num_dropped_turns)})
    with (
        whole_file(path) as unfinished,
        pa.OSFile(str(unfinished), "wb") as file,
        pa.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def _load(path: Path) -> Survey:
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    errors = json.loads(batch.schema.metadata[b"errors"])
    return Survey(
        **{name: batch.column(name).to_numpy(zero_copy_only=True) for name in COLUMNS},
        num_dropped_turns=int(batch.schema.metadata[b"num_dropped_turns"]),
        errors={int(row): DataError(**fields) for row, fields in errors.items()},
    )


def _mended(corpus: Corpus, found: Survey) -> Survey:
    rows = [row for row, error in found.errors.items() if error.kind in _OF_PICTURES]
    if not rows:
        return found
    columns, errors = read_rows(corpus, rows)
    for place, row in enumerate(rows):
        if row not in errors:
            try:
                check_pictures(map(Path, corpus.encode(row).example.images), whole=True)
            except DataError as error:
                columns[place] = 0
                errors[row] = corpus.locate(error, row)
    arrays = {name: np.array(getattr(found, name)) for name in COLUMNS}  # a copy: files are not changed
    for name, array in arrays.items():
        array[rows] = columns[name]
    others = {row: error for row, error in found.errors.items() if row not in set(rows)}
    return replace(
        found,
        **arrays,
        num_dropped_turns=found.num_dropped_turns + int(columns["dropped_turns"].sum()),
        errors=dict(sorted((others | errors).items())),
    )
