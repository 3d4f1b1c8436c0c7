"""Micro-batches for one rank, decoded by workers ahead of the step that needs them."""

import atexit
import os
import queue
import resource
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from multiprocessing import resource_sharer
from multiprocessing.util import Finalize, get_temp_dir
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from llava_accel.data.collate import collate
from llava_accel.data.corpus import Corpus
from llava_accel.data.labels import Example
from llava_accel.data.pixels import ImageReader, LoadedImage
from llava_accel.data.sampler import MicroBatch, Window
from llava_accel.data.tiling import ImageLayout, ImageView
from llava_accel.data.trie import Row, build_row, chain, pack_rows, share_rows
from llava_accel.exceptions import SIGNALS, UserError, kill_workers
from llava_accel.sources.problems import DataError

Loaded = dict[str, Tensor | bool | Sequence[ImageLayout]]
"""The fields of `collate.Batch`."""
_WAIT_S = 0.1
_LONGEST_TEMPORARY = 70  # bytes: the address of a socket has 107, and multiprocessing adds two names to the folder
_SHORT_TEMPORARY = "/tmp"
_T = TypeVar("_T")


class _MicroBatches(Dataset[tuple[Loaded, list[DataError]]]):
    """Index: the rows of a micro-batch. Errors travel as values: raised in a worker they would lose their message."""

    def __init__(self, corpus: Corpus, image_reader: ImageReader, share_up_to: int, pack: bool) -> None:
        self._corpus = corpus
        self._image_reader = image_reader
        self._share_up_to = share_up_to
        self._pack = pack

    def __getitem__(self, micro_batch: MicroBatch) -> tuple[Loaded, list[DataError]]:
        records: list[tuple[Example, ...]] = []
        images: dict[ImageView, LoadedImage] = {}
        errors: list[DataError] = []
        reference: list[float] = []
        for index in micro_batch:
            try:
                encoded = self._corpus.encode(index)
                views = encoded.example.images
                images |= {view: self._image_reader.load(view) for view in views if view not in images}
                reference += self._corpus.reference_of(index)
                records.append(encoded.examples)  # last, so that nothing of a record is left where it fails
            except DataError as error:
                errors.append(self._corpus.locate(error, index))
        return collate(self._rows(records), images, self._image_reader.shape, reference=reference), errors

    def _rows(self, records: Sequence[Sequence[Example]]) -> list[Row]:
        numbers = count()
        records = [[replace(example, number=next(numbers)) for example in examples] for examples in records]
        if self._share_up_to:
            rows = share_rows([example for examples in records for example in examples], self._share_up_to)
        elif self._pack:  # answers to one question follow one prompt in any case
            rows = [build_row(examples) for examples in records]
        else:
            rows = [chain(example) for examples in records for example in examples]
        return pack_rows(rows) if self._pack else rows


def load_windows(
    corpus: Corpus,
    image_reader: ImageReader,
    windows: Iterable[Window],
    *,
    workers: int,
    device: torch.device,
    on_error: Callable[[DataError], None] | None = None,
    share_up_to: int = 0,
    enter: Callable[[str], None] | None = None,
    is_asked: Callable[[], bool] | None = None,
    pack: bool = False,
) -> Iterator[list[Loaded]]:
    """Yield the micro-batches of each window on `device`.

    Args:
        windows: Rows of the corpus for every micro-batch of every step of this rank.
        workers: Processes that decode images; 0 decodes in the loop's own process.
        on_error: Called for each record that the survey found in order and that is broken now, and the step goes on
            without it; None raises the error.
        share_up_to: Join examples of the same images into rows of at most so many tokens; 0 = a row for each record.
        enter: Called when copying to the device begins ("copy") and ends ("data_wait"), for the clock of the run.
        is_asked: Whether the process has been asked to end. Then no data is waited for, and the last window is empty, so
            that this rank, too, reaches the point where all ranks agree on the end.
        pack: Put short rows side by side, and answers to one question after one prompt, where the attention kernel takes a
            mask that keeps them apart.
    """
    sizes: list[int] = []

    def micro_batches() -> Iterator[MicroBatch]:
        for window in windows:
            sizes.append(len(window))
            yield from window

    loader = DataLoader(
        _MicroBatches(corpus, image_reader, share_up_to, pack),
        sampler=micro_batches(),  # pyright: ignore[reportArgumentType]  # an endless order has no length
        batch_size=None,
        num_workers=workers,
        collate_fn=in_shared_memory,
        worker_init_fn=worker_start(workers),
        pin_memory=device.type != "cpu",
    )
    window: list[Loaded] = []
    arrived = received(iter(loader))
    for micro_batch, errors in _waited(arrived, is_asked) if is_asked else arrived:
        for error in errors:
            if on_error is None:
                raise error
            on_error(error)
        if enter:
            enter("copy")
        window.append(moved(micro_batch, device))
        if enter:
            enter("data_wait")
        if len(window) == sizes[0]:
            del sizes[0]
            yield window
            window = []
    if is_asked and is_asked():
        yield []


def received(items: Iterator[_T]) -> Iterator[_T]:
    """The items of a loader. A worker that ends while what it has sent is on its way is torch's error of a lost worker.

    Tensors come through a socket of the worker, and are fetched after their message: without the worker nobody answers.
    """
    try:
        yield from items
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        frames = traceback.walk_tb(error.__traceback__)
        if all(frame.f_code.co_filename != resource_sharer.__file__ for frame, _ in frames):
            raise
        raise RuntimeError("DataLoader worker (pid unknown) exited unexpectedly") from error


def _waited(items: Iterator[_T], is_asked: Callable[[], bool]) -> Iterator[_T]:
    """The items, as they are asked for; ends early if `is_asked` becomes true while one is waited for.

    A thread waits for them. Python runs signal handlers in the main thread, and one that only sets a flag does not end a
    wait there.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    came: queue.SimpleQueue[list[_T] | BaseException] = queue.SimpleQueue()

    def fetch() -> None:
        while wanted.get():
            try:
                came.put([next(items)])
            except StopIteration:
                came.put([])
            except BaseException as error:
                came.put(error)

    threading.Thread(target=fetch, daemon=True, name="data").start()
    try:
        while not is_asked():
            wanted.put(True)
            item = None
            while item is None and not is_asked():
                try:
                    item = came.get(timeout=_WAIT_S)
                except queue.Empty:
                    pass
            if isinstance(item, BaseException):
                raise item
            if not item:
                return
            yield item[0]
    finally:
        wanted.put(False)


def in_shared_memory(loaded: _T) -> _T:
    """The data that a worker has loaded, with its tensors in shared memory. Outside a worker it is left as it is.

    The thread that sends tensors would move them there, too; but if there is no room it only prints the error, and the run
    would wait for ever.
    """
    if get_worker_info() is not None:
        for each in _tensors(loaded):
            each.share_memory_()
    return loaded


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, LoadedImage):
        yield value.tensor
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def worker_start(workers: int) -> Callable[[int], None]:
    """The function that each worker process calls first. Also raises this process's limit on open files.

    Raises:
        UserError: the path of temporary files is too long for the sockets that workers send tensors through.
    """
    if workers:  # each tensor that is on its way is an open file
        with suppress(ValueError, OSError):
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    short = "" if not workers or len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_TEMPORARY else _SHORT_TEMPORARY
    if short and not os.access(short, os.W_OK | os.X_OK):
        raise UserError(
            f"TMPDIR: workers cannot send data through sockets in {tempfile.gettempdir()}, whose path is longer than "
            f"{_LONGEST_TEMPORARY} bytes, and {short} cannot be written. Set TMPDIR to a shorter path, or data.workers = 0"
        )
    if workers and not short:
        get_temp_dir()  # for the sockets of all workers: one that a worker makes stays where that is killed
    return partial(_start_worker, short)


def _start_worker(temporary: str, _worker: int) -> None:
    """Ignore the signals that schedulers and terminals send to every process: workers go on until the loop ends them."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    if temporary:
        tempfile.tempdir = temporary
    else:
        Finalize(None, _remove_if_orphaned, (get_temp_dir(), os.getppid()), exitpriority=-1)


def _remove_if_orphaned(folder: str, parent: int) -> None:
    """Remove the folder of sockets if the process that would do so was killed, and no other worker has a socket there.

    `multiprocessing.parent_process` takes that process for alive as long as a worker that was started later is.
    """
    if os.getppid() != parent:
        with suppress(OSError):
            os.rmdir(folder)


# A run that ends in an error still has its loaders. Registered after multiprocessing.util, which is imported above, because
# atexit calls the last function first.
atexit.register(kill_workers)


def moved(batch: Loaded, device: torch.device) -> Loaded:
    """A batch with its tensors on `device`."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def tensor(batch: Loaded, name: str) -> Tensor:
    """A field of a batch that is a tensor."""
    value = batch[name]
    assert isinstance(value, Tensor)
    return value


def where(micro_batches: Sequence[Loaded], corpus: Corpus) -> list[str]:
    """Ids of the records in these micro-batches, for reports."""
    return [corpus.record(row).id for batch in micro_batches for row in tensor(batch, "indices").tolist()]


def lengths_of(micro_batches: Sequence[Loaded], corpus: Corpus) -> list[int]:
    """Tokens of the records in these micro-batches, in the order of `where`."""
    rows = (row for batch in micro_batches for row in tensor(batch, "indices").tolist())
    return [len(corpus.encode(row).example.input_ids) for row in rows]
