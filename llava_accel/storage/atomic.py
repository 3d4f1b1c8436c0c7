"""Files and folders that are complete or not there at all: written beside their place, flushed, and then renamed.

Ranks, other runs and kills never meet half of one. A folder is also sealed with a manifest of hashes.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"


@contextmanager
def atomic_file(path: Path, *, is_private: bool = False) -> Iterator[Path]:
    """A place beside `path` to write to. What is there takes the name `path` at the end, and is gone after an error.

    Args:
        is_private: Nobody but the user may read it, as everything in the cache.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if is_private:
            unfinished.touch(mode=0o600)
        yield unfinished
        _flush(unfinished)  # else a power cut could leave the name without the content
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def beside(target: Path) -> Path:
    """Where a folder is written before `commit` gives it its name; whatever a killed run left there is removed."""
    unfinished = target.with_name(f"{target.name}.tmp")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    return unfinished


def commit(unfinished: Path, target: Path, *, manifest: bool = True) -> None:
    """Flush the folder to disk, and give it the name `target`, which it may take from another folder.

    Args:
        manifest: Seal it with a manifest of hashes, and read all of it back before the old folder goes.

    Raises:
        OSError: it could not be written, or the disk does not give back what was written.
    """
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    for path in files:
        _flush(path)
    if manifest:
        hashes = {str(path.relative_to(unfinished)): _hash(path) for path in sorted(files)}
        (unfinished / MANIFEST).write_text(json.dumps(hashes, indent=1))
        _flush(unfinished / MANIFEST)
    for path in [*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished]:
        _flush_folder(path)
    if manifest and not is_complete(unfinished, from_disk=True):
        raise OSError(errno.EIO, "the disk does not give back what was written", str(unfinished))
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(unfinished, target)
    _flush_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Tidy up what a killed run left in the middle of `commit`: unfinished folders, and folders without their name."""
    for unfinished in folder.glob("*.tmp"):
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
    for old in folder.glob("*.old"):
        target = old.with_suffix("")
        if target.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, target)


def is_complete(folder: Path, *, from_disk: bool = False) -> bool:
    """Whether every file of the manifest is there and unchanged.

    Args:
        from_disk: Read what is on the disk, not what the system remembers of it.
    """
    if not (folder / MANIFEST).is_file():
        return False
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except ValueError:  # damaged itself
        return False
    return all((folder / name).is_file() and _hash(folder / name, from_disk) == hashes[name] for name in hashes)


def is_of_the_disk(error: Exception) -> bool:
    """Whether writing failed. What tokenizers raises then is a bare Exception with the words of Rust's standard library."""
    return isinstance(error, OSError | SafetensorError) or (type(error) is Exception and "(os error " in str(error))


def _hash(path: Path, from_disk: bool = False) -> str:
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
