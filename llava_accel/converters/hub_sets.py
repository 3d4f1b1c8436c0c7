"""A data set of the hub, or any other that data.train reads -> JSON lines in LLaVA's form, and images as files.

A recipe reads such a set as it is; this is for those who want to look at it, change it, or hand it on.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from llava_accel.converters.entry import Rows
from llava_accel.converters.faults import Part
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import find_images
from llava_accel.data.images import content_of
from llava_accel.data.records import Record
from llava_accel.data.row_forms import RowForm
from llava_accel.sources.flags import in_flags
from llava_accel.sources.named import Named
from llava_accel.sources.problems import DataError
from llava_accel.storage.kept_files import cache_folder

_AS_FLAGS = {
    "data.train and data.eval": "--set",
    "relative to data.images, or set data.images to a folder that holds all images": "relative to the folder of its file",
    "below data.images": "in the folder of its file",
    ", or set data.images": "",
    ", make them with a function of yours (data.reader)": "",
    "data.columns.": "--columns ",
}
"""Words of errors about keys -> the same for the command line of `prepare hf`; longer ones first."""
_NAMED_SPLIT = re.compile(r'Name one: \{path = ".*", split = "(.*)"\}')
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"GI": "gif", b"RI": "webp", b"BM": "bmp", b"II": "tif", b"MM": "tif"}


def hub_parts(name: str, config: str, splits: Sequence[str], form: RowForm, out: Path) -> Iterator[Part]:
    """A part for each split, whose images are written into `out`/images.

    Args:
        name: org/name, or a file or folder.
        form: How rows are read. The rejected answers of pairs are kept, too.

    Raises:
        DataError: it cannot be loaded, or has no such split.
    """
    for split in splits:
        try:
            sources = open_sources([Named(name, config=config, splits=(split,))], cache_folder())
        except DataError as error:
            raise _of_prepare(error) from None
        rows = _rows(Corpus(sources, find_images, replace(form, pairs=True)), out / "images")
        yield Part(out=out / f"{split}.jsonl", rows=rows, source=f"{name}, split {split}")


def _of_prepare(error: DataError) -> DataError:
    """The error with flags of `prepare hf` in place of a recipe's keys."""
    worded = in_flags(error, _AS_FLAGS)
    return replace(worded, remedy=_NAMED_SPLIT.sub(r"Name one with --split \1", worded.remedy))


def _rows(corpus: Corpus, folder: Path) -> Rows:
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    for index in range(len(corpus)):
        try:
            record = corpus.record(index)
            yield _in_llavas_form(record, [_copy(each, folder, written) for each in corpus.image_files(index)])
        except DataError as error:
            yield _of_prepare(corpus.locate(error, index))


def _in_llavas_form(record: Record, images: list[str]) -> dict[str, object]:
    turns = [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in record.turns]
    fields = {
        "image": images if len(images) > 1 else images[0] if images else None,
        "question": record.question,
        "answers": dict(record.answers),
        "question_type": record.question_type,
        "answer_type": record.answer_type,
        "choices": list(record.choices),
        "rejected": record.rejected,
    }
    return {"id": record.id, "conversations": turns} | {name: value for name, value in fields.items() if value}


def _copy(address: str, folder: Path, written: dict[str, str]) -> str:
    """The name of an image's copy, which is made if `written` (address -> name) has none. The name is a hash of the
    content, as files of several folders may share a name."""
    if address not in written:
        content = content_of(address)
        name = f"{hashlib.sha256(content).hexdigest()[:32]}.{_SUFFIXES.get(content[:2], 'img')}"
        (folder / name).write_bytes(content)
        written[address] = name
    return written[address]
