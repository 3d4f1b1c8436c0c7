"""Folders that are complete or not there at all: sealed with a manifest of hashes, put in place by a rename."""

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Unfinished ones have another name and are not seen."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def beside(target: Path) -> Path:
    """Where a folder is written before `commit` gives it its name; whatever a killed run left there is removed."""
    unfinished = target.with_name(f"{target.name}.tmp")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    return unfinished


def commit(unfinished: Path, target: Path) -> None:
    """Flush the folder to disk, seal it, read it back, and give it the name `target`, which it may take from another.

    Raises:
        OSError: it could not be written, or the disk does not give back what was written.
    """
    _seal(unfinished)
    if not is_complete(unfinished, from_disk=True):
        raise OSError(errno.EIO, "the disk does not give back what was written", str(unfinished))
    old = _old(target)
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


def _seal(folder: Path) -> None:
    hashes: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _flush(path)
        hashes[str(path.relative_to(folder))] = _hash(path)
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1))
    _flush(folder / MANIFEST)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _flush_folder(path)


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


def _old(target: Path) -> Path:
    return target.with_name(f"{target.name}.old")
