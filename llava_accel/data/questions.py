"""Batches to evaluate: questions on the same images share their prefix, and it is known where each answer begins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset

from llava_accel.data.collate import collate
from llava_accel.data.corpus import Corpus
from llava_accel.data.labels import Example
from llava_accel.data.loader import Loaded, in_shared_memory, moved, received, worker_start
from llava_accel.data.pixels import ImageReader, LoadedImage
from llava_accel.data.records import Record
from llava_accel.data.sampler import image_groups
from llava_accel.data.tiling import ImageView
from llava_accel.data.trie import Row, share_rows
from llava_accel.sources.problems import DataError

USUAL_LENGTH = 2048
"""Tokens of a prompt up to which a batch holds as many rows as it may have questions."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The questions of a batch; arrays have one entry per question, in the order in which the batch holds the targets."""

    indices: Int[np.ndarray, "questions"]
    """Places in the data."""
    rows: Int[np.ndarray, "questions"]
    """Row of the batch."""
    places: Int[np.ndarray, "questions"]
    """Place in the row of the token whose hidden state predicts the first token of the (last) answer."""
    num_targets: Int[np.ndarray, "questions"]
    stop_ids: frozenset[int]
    """Tokens that end the answers of these examples: a chat template may choose its own."""
    records: tuple[Record, ...]


def image_batches(
    rows: Int[np.ndarray, "rows"], lengths: Int[np.ndarray, "rows"], image_keys: Int[np.ndarray, "rows"], size: int
) -> list[list[int]]:
    """Rows of the data in batches of at most `size`, those on the same images side by side.

    The longest come first, so that a batch that does not fit into memory fails at once; neighbours are of nearly equal
    length. More questions on an image than `size` become several batches, and prompts beyond `USUAL_LENGTH` become
    batches of fewer rows: those of images in many tiles are over ten times as long as others.

    Args:
        lengths, image_keys: See `Survey`; of these rows.
    """
    groups = image_groups(image_keys)
    longest = np.zeros(2 * len(rows) + 1, dtype=np.int64)
    np.maximum.at(longest, groups, lengths)
    order = np.lexsort((groups, -longest[groups]))
    edges = np.nonzero(np.diff(groups[order]))[0] + 1
    batches: list[list[int]] = []
    room = 0  # rows, each with the prefix of its questions, that the last batch can still take
    for group in np.split(order, edges):
        for start in range(0, len(group), size):
            part = rows[group[start : start + size]].tolist()
            if not room or len(batches[-1]) + len(part) > size:
                batches.append([])
                room = max(1, size * USUAL_LENGTH // int(longest[groups[group[0]]]))
            batches[-1] += part
            room -= 1
    return batches


def load_questions(
    corpus: Corpus,
    image_reader: ImageReader,
    batches: Sequence[list[int]],
    *,
    workers: int,
    device: torch.device,
    max_length: int,
    blind: bool = False,
) -> Iterator[tuple[Loaded, Questions]]:
    """Yield each batch on `device` with its questions.

    Args:
        batches: Rows of the corpus. An empty batch is one token of padding without a question.
        workers: Processes that encode records and decode images; 0 does it here.
        max_length: Tokens of a row in which questions share their prefix.
        blind: Leave the images out; their places in the text stay.

    Raises:
        DataError: a record or image was changed since the survey, and is broken now.
    """
    data = _Batches(corpus, image_reader, batches, max_length, blind)
    loader = DataLoader(
        data,
        batch_size=None,
        num_workers=workers,
        collate_fn=in_shared_memory,
        pin_memory=device.type != "cpu",
        worker_init_fn=worker_start(workers),
    )
    for loaded, questions in received(iter(loader)):
        if isinstance(questions, DataError):
            raise questions
        yield moved(loaded, device), questions


class _Batches(Dataset[tuple[Loaded, Questions | DataError]]):
    """Errors travel as values: raised in a worker they would lose their message."""

    def __init__(
        self, corpus: Corpus, image_reader: ImageReader, batches: Sequence[list[int]], max_length: int, blind: bool
    ) -> None:
        self._corpus, self._image_reader, self._batches = corpus, image_reader, batches
        self._max_length, self._blind = max_length, blind

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> tuple[Loaded, Questions | DataError]:
        examples: dict[int, Example] = {}
        images: dict[ImageView, LoadedImage] = {}
        for index in self._batches[number]:
            try:
                examples[index] = self._corpus.encode(index).example
                for view in () if self._blind else examples[index].images:
                    if view not in images:
                        images[view] = self._image_reader.load(view)
            except DataError as error:
                return {}, self._corpus.locate(error, index)
        rows = share_rows(list(examples.values()), self._max_length)
        seen = [replace(row, images=(), image_starts=()) for row in rows] if self._blind else rows
        records = {index: self._corpus.record(index) for index in examples}
        return collate(seen, images, self._image_reader.shape), ask(rows, examples, records)


def ask(rows: Sequence[Row], examples: dict[int, Example], records: dict[int, Record]) -> Questions:
    """The questions of these rows: where each example's last answer begins is found from the positions of its targets."""
    found: list[tuple[int, int, int, int]] = []
    for number, row in enumerate(rows):
        before = 0
        for index in row.indices:
            example = examples[index]
            first = int(example.is_target[: example.prompt_length()].sum())
            found.append((index, number, int(row.target_positions[before + first]), example.num_targets))
            before += example.num_targets
    indices, numbers, places, counts = np.array(found, dtype=np.int64).reshape(-1, 4).T
    return Questions(
        indices=indices,
        rows=numbers,
        places=places,
        num_targets=counts,
        stop_ids=frozenset(example.end_id for example in examples.values()),
        records=tuple(records[index] for index in indices.tolist()),
    )
