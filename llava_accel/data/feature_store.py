"""Features of a frozen vision tower, kept on disk: a folder of memory-mapped safetensors files for each tower.

A record is what the tower made of one image, under the hash of the image file's content. Any number of processes may
write into the same folder: a lock makes them take turns and keep to one limit together.
"""

import atexit
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_accel.exceptions import UserError
from llava_accel.storage.atomic import atomic_file

DIGEST_BYTES = 16
_SHARD_BYTES = 64 << 20  # what a writer holds in memory at most, and a kill can lose
_LONGEST_WAIT = 30.0  # seconds
_HEADER_BYTES = 160  # of a record in a file's header, at most


def digest(content: bytes) -> bytes:
    """The name of an image: a hash of the file's content, wherever the file is."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


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
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        self._seen = -1

    def __len__(self) -> int:
        self._refresh()
        return len(self._places)

    def __contains__(self, name: bytes) -> bool:
        if name.hex() not in self._places:
            self._refresh()
        return name.hex() in self._places

    def __getitem__(self, name: bytes) -> Float[Tensor, "tokens channels"]:
        """The record of an image; a view of the file, in the type in which it was computed.

        Raises:
            KeyError: it is not stored.
            UserError: a file was deleted or damaged meanwhile.
        """
        if name not in self:
            raise KeyError(name.hex())
        return self._open(self._places[name.hex()]).get_tensor(name.hex())

    def num_bytes(self) -> int:
        """Disk space of this tower's records."""
        return _size(self.folder)

    def _refresh(self) -> None:
        now = os.stat(self.folder).st_mtime_ns
        if now == self._seen:
            return
        for name in os.listdir(self.folder):
            if name.endswith(".safetensors") and name not in self._files:
                self._places |= dict.fromkeys(self._open(name).keys(), name)
        self._seen = now

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{self.folder / file} cannot be read ({error}). Delete it: its features are computed again"
                ) from None
        return self._files[file]

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "folder": self.folder}  # open files stay in their process

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reset()


class FeatureWriter:
    """Adds records to a store, as far as they fit. Records wait in memory until there are enough for a file.

    Args:
        max_bytes: Limit on the features of all towers below `store.root`.
    """

    def __init__(self, store: FeatureStore, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._arriving: list[tuple[Tensor, Tensor, torch.cuda.Event | None]] = []
        self._waiting: dict[bytes, Tensor] = {}
        self._waiting_bytes = 0
        # The first files come soon, so that a second pass over little data finds them; later ones are larger.
        self._pause, self._since = 0.5, time.monotonic()
        self.is_full = False
        atexit.register(self.flush)

    def put(self, names: UInt8[Tensor, "images 16"], features: Float[Tensor, "images tokens channels"]) -> None:
        """Keep what the tower made of some images. Does not wait for the device: it is fetched at the next call."""
        self._fetch()
        if self.is_full:
            return
        on_cpu = [value.detach().to("cpu", non_blocking=True) for value in (names, features)]
        event = torch.cuda.Event() if features.is_cuda else None
        if event is not None:
            event.record()
        self._arriving.append((on_cpu[0], on_cpu[1], event))
        if self._waiting_bytes >= _SHARD_BYTES or (self._waiting and time.monotonic() - self._since > self._pause):
            self._write()

    def flush(self) -> None:
        """Write all that waits. Call it at the end; the end of the process does so, too."""
        self._fetch()
        self._write()

    def _fetch(self) -> None:
        for names, features, event in self._arriving:
            if event is not None:
                event.synchronize()
            for name, record in zip(names.numpy(), features, strict=True):
                if name.tobytes() not in self._waiting and name.tobytes() not in self._store:
                    # A SigLIP leaves its channels apart; files hold them side by side.
                    self._waiting[name.tobytes()] = record.clone(memory_format=torch.contiguous_format)
                    self._waiting_bytes += record.nbytes
        self._arriving = []

    def _write(self) -> None:
        if self._waiting and not self.is_full:
            with _turn(self._store.root):
                chosen = dict(self._fitting())
                if chosen:
                    with atomic_file(
                        self._store.folder / f"{uuid.uuid4().hex}.safetensors", is_private=True
                    ) as unfinished:
                        save_file(chosen, unfinished)
            self.is_full = len(chosen) < len(self._waiting)
        self._waiting, self._waiting_bytes = {}, 0
        self._pause, self._since = min(2 * self._pause, _LONGEST_WAIT), time.monotonic()

    def _fitting(self) -> Iterator[tuple[str, Tensor]]:
        left = self._max_bytes - sum(_size(folder) for folder in self._store.root.iterdir() if folder.is_dir())
        for name, record in self._waiting.items():
            left -= record.nbytes + _HEADER_BYTES
            if left < 0:
                return
            if name not in self._store:  # another process may have written it while this one waited for its turn
                yield name.hex(), record


@contextmanager
def _turn(root: Path) -> Iterator[None]:
    with (root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it when the process ends, however it ends
        for folder in root.iterdir():
            for left in folder.glob("*.tmp") if folder.is_dir() else ():
                left.unlink()  # of a process that was killed: nobody else is writing now
        yield


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in os.scandir(folder) if file.name.endswith(".safetensors"))
