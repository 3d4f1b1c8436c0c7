"""Features of a frozen vision tower, kept on disk: a folder of memory-mapped safetensors files for each tower.

A record holds the features of one image, under the hash of the image file's content. Any number of processes may
write into the same folder: a lock makes them take turns and keep to one limit together. Each record has a checksum; a file
with a damaged one is removed, and its features are computed again.
"""

import atexit
import errno
import fcntl
import hashlib
import os
import re
import time
import uuid
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_accel.console.output import note
from llava_accel.storage.atomic import atomic_file

DIGEST_BYTES = 16
_MEAN = b"mean"
"""Suffix of a record's name under which its mean over all tokens is kept: it is read faster than the whole record."""
_SHARD_BYTES = 64 << 20  # the most that a writer holds in memory, and a kill can lose
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_HEADER_BYTES = 220  # of a record and its checksum in a file's header, at most
_PATIENCE_S, _PATIENCE_AT_END_S = 30.0, 2.0  # for a process that holds the lock; writing a file takes about a second
_UNFINISHED = re.compile(r"[0-9a-f]{32}\.safetensors\.[0-9a-f]{32}\.tmp")


def digest(content: bytes, is_cut: bool = False) -> bytes:
    """The name of an image: a hash of the file's content, wherever the file is, and of whether it is cut into tiles."""
    return hashlib.sha256(content + b"tiles" * is_cut).digest()[:DIGEST_BYTES]


class FeatureStore:
    """The records of one tower. Readers see what other processes write meanwhile.

    Args:
        root: Folder of all towers' features.
        key: Name of the tower, its layer, its preprocessing and its type: see `setup/vision_cache.py`.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.root = root
        self.folder = root / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._reset()

    def _reset(self) -> None:
        self._files: dict[str, tuple[Any, dict[str, str]]] = {}  # with the checksums in each
        self._places: dict[str, str] = {}
        self._given_up: set[str] = set()
        self._seen = -1

    def __bool__(self) -> bool:
        return True  # also when it is empty

    def __len__(self) -> int:
        self._refresh()
        return sum(len(name) == 2 * DIGEST_BYTES for name in self._places)

    def __contains__(self, name: bytes) -> bool:
        if name.hex() not in self._places:
            self._refresh()
        return name.hex() in self._places

    def get(self, name: bytes) -> Float[Tensor, "tiles tokens channels"] | None:
        """The record of an image; a view of the file, in the type in which it was computed. None if there is none."""
        while name in self:
            file = self._places[name.hex()]
            opened = self._open(file)
            if opened is None:
                continue  # its names are forgotten
            record = opened[0].get_tensor(name.hex())
            if opened[1].get(name.hex()) in (None, _checksum(record)):  # earlier versions wrote no checksum
                return record
            self._give_up(file, "a bit of it has changed", remove=True)
        return None

    def mean(self, name: bytes) -> Float[Tensor, " channels"] | None:
        """The mean of an image's record over its tokens. None if there is no record."""
        features = self.get(name + _MEAN)
        features = self.get(name) if features is None else features  # earlier versions wrote no mean
        return None if features is None else features.float().mean((0, 1))

    def num_bytes(self) -> int:
        """Disk space of this tower's records."""
        return _size(self.folder)

    def _refresh(self) -> None:
        try:
            now = os.stat(self.folder).st_mtime_ns
        except FileNotFoundError:  # the cache was removed meanwhile
            return
        if now == self._seen:
            return
        for name in os.listdir(self.folder):
            is_new = name.endswith(".safetensors") and name not in self._files and name not in self._given_up
            if is_new and (opened := self._open(name)) is not None:
                self._places |= dict.fromkeys(opened[0].keys(), name)
        self._seen = now

    def _open(self, file: str) -> tuple[Any, dict[str, str]] | None:
        """The file and its checksums, or None where it is gone or damaged."""
        if file not in self._files:
            try:
                opened = safe_open(self.folder / file, framework="pt")
                self._files[file] = opened, opened.metadata() or {}
            except FileNotFoundError:  # another process has found it damaged, or the cache was cleared
                self._forget(file)
            except SafetensorError as error:
                self._give_up(file, str(error), remove=True)
            except OSError as error:  # an error of the disk, or too many open files: the file may be whole
                self._give_up(file, error.strerror or str(error), remove=False)
        return self._files.get(file)

    def _give_up(self, file: str, reason: str, *, remove: bool) -> None:
        self._forget(file)
        try:
            if remove:
                (self.folder / file).unlink()
        except FileNotFoundError:
            return
        except OSError as error:
            reason += f"; it cannot be removed: {error.strerror}"
        note(f"{self.folder / file} cannot be used ({reason}): its features are computed again")

    def _forget(self, file: str) -> None:
        self._given_up.add(file)
        self._files.pop(file, None)
        self._places = {name: place for name, place in self._places.items() if place != file}

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "folder": self.folder}  # open files stay in their process

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reset()


class FeatureWriter:
    """Adds records to a store, as far as they fit. Records wait in memory until there are enough for a file.

    If writing or locking fails, a note says so and nothing more is kept: no run ends because of its cache.

    Args:
        max_bytes: Limit on the features of all towers below `store.root`.
    """

    def __init__(self, store: FeatureStore, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._arriving: deque[tuple[Tensor, Tensor, torch.Event | None]] = deque()
        self._waiting: dict[bytes, Tensor] = {}
        self._waiting_bytes = 0
        # The first files come soon, so that a second pass over little data finds them; later ones are larger.
        self._pause, self._since = _FIRST_WAIT, time.monotonic()
        self.is_full = False
        """Whether nothing more is kept."""
        self.problem = ""
        """Why it cannot be written, if that is the reason."""
        atexit.register(self.flush, _PATIENCE_AT_END_S)

    def put(self, names: UInt8[Tensor, "tiles 16"], features: Float[Tensor, "tiles tokens channels"]) -> None:
        """Keep the tower's features of some images. Does not wait for the device, but fetches what has arrived by then.

        Args:
            names: The name of the image that begins with each tile; zeros for its other tiles, which follow.
        """
        self._fetch(waits=False)
        if self.is_full:
            return
        on_cpu = [value.detach().to("cpu", non_blocking=True) for value in (names, features)]
        event = None if features.device.type == "cpu" else torch.Event(features.device)
        if event is not None:
            event.record()
        self._arriving.append((on_cpu[0], on_cpu[1], event))
        if self._waiting_bytes >= _SHARD_BYTES or (self._waiting and time.monotonic() - self._since > self._pause):
            self._write()

    def flush(self, patience_s: float | None = None) -> None:
        """Write all waiting records. Call it at the end of a run; the end of the process calls it, too.

        Args:
            patience_s: Seconds to wait for another process that is writing; by default as long as within a run.
        """
        self._fetch(waits=True)
        self._write(patience_s)

    def _fetch(self, *, waits: bool) -> None:
        while self._arriving:
            names, features, event = self._arriving[0]
            if event is not None and waits:
                event.synchronize()
            elif event is not None and not event.query():
                return
            self._arriving.popleft()
            starts = names.any(dim=1).nonzero().flatten()
            counts = torch.diff(starts, append=torch.tensor([len(names)]))
            for name, record in zip(names[starts].numpy(), features.split(counts.tolist()), strict=True):
                if name.tobytes() not in self._waiting and self._store.get(name.tobytes()) is None:
                    # SigLIP's channels are not adjacent in memory; in files they are.
                    mean = record.float().mean((0, 1), keepdim=True)
                    self._waiting[name.tobytes()] = record.clone(memory_format=torch.contiguous_format)
                    self._waiting[name.tobytes() + _MEAN] = mean
                    self._waiting_bytes += record.nbytes + mean.nbytes

    def _write(self, patience_s: float | None = None) -> None:
        if self._waiting and not self.is_full:
            patience_s = _PATIENCE_S if patience_s is None else patience_s
            try:
                self.is_full = self._write_fitting(patience_s) < len(self._waiting)
            except (OSError, SafetensorError) as error:
                self.is_full, self.problem = True, (isinstance(error, OSError) and error.strerror) or str(error)
                note(
                    f"vision features: no more are kept in {self._store.root} ({self.problem}); the tower computes the "
                    "others in every epoch"
                )
        self._waiting, self._waiting_bytes = {}, 0
        self._pause, self._since = min(2 * self._pause, _LONGEST_WAIT), time.monotonic()

    def _write_fitting(self, patience_s: float) -> int:
        with turn(self._store.root, patience_s):
            chosen = dict(self._fitting())
            if chosen:
                checksums = {name: _checksum(record) for name, record in chosen.items()}
                target = self._store.folder / f"{uuid.uuid4().hex}.safetensors"
                with atomic_file(target, is_private=True) as unfinished:
                    save_file(chosen, unfinished, metadata=checksums)
        return len(chosen)

    def _fitting(self) -> Iterator[tuple[str, Tensor]]:
        left = self._max_bytes - sum(_size(folder) for folder in self._store.root.iterdir() if folder.is_dir())
        for name, record in self._waiting.items():
            left -= record.nbytes + _HEADER_BYTES
            if left < 0:
                return
            if self._store.get(name) is None:  # another process may have written it while this one waited for its turn
                yield name.hex(), record


@contextmanager
def turn(root: Path, patience_s: float) -> Iterator[None]:
    """Hold the lock that lets one process at a time write below `root`.

    Raises:
        OSError: the file system has no locks, or another process holds this one for longer than `patience_s`.
    """
    with (root / "lock").open("w") as file:
        _lock(file, time.monotonic() + patience_s)  # the system releases it when the process ends, however it ends
        for left in root.glob("*/*.tmp"):
            if _UNFINISHED.fullmatch(left.name):
                left.unlink()  # of a process that was killed: nobody else is writing now
        yield


def _lock(file: IO[str], deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process does not release its lock", file.name) from None
            time.sleep(0.05)
        else:
            return


def _checksum(record: Tensor) -> str:
    return f"{zlib.crc32(record.contiguous().flatten().view(torch.uint8).numpy().data):08x}"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in os.scandir(folder) if file.name.endswith(".safetensors"))
