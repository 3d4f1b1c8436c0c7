"""Files and folders that are complete or not there at all: written beside their place, flushed, and then renamed.

Ranks, other runs and kills never meet half of one. A folder is also sealed with a manifest of hashes.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llava_accel.exceptions import DISK_IS_FULL, UserError

MANIFEST = "manifest.json"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPAN = re.compile(r"(\d+)-(\d+)")
_LEFT = re.compile(r"(?P<name>.+)\.[0-9a-f]{8}\.(?P<state>tmp|old)")
_AT_ONCE = 8  # files, or pieces of them, that are hashed at the same time
_BLOCK_BYTES = 1 << 20  # read at once
Piece = tuple[int, int, str]
"""Start and end of a piece of a file, in bytes, the end exclusive; and its SHA-256."""
_Place = tuple[Path, int, int | None]
"""A file, and start and exclusive end of a piece of it, in bytes; None for the end of the file."""


@contextmanager
def atomic_file(path: Path, *, is_private: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to. It is renamed to `path` at the end, and removed after an error.

    Args:
        is_private: Only the user may read the file, as all files of the cache.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        if is_private:
            unfinished.touch(mode=0o600)
        yield unfinished
        flush(unfinished)  # else a power cut could leave the name without the content
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno in DISK_IS_FULL:  # this error names no file
            error.filename = error.filename or str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def check_out(path: Path, flag: str, example: str) -> None:
    """UserError if no file can be written at `path`; for use before the work whose result goes there. Leaves nothing there.

    Args:
        flag: The flag that the user named it with.
        example: A name for such a file.
    """
    try:
        is_folder = path.is_dir()
        there = next(place for place in path.absolute().parents if place.is_symlink() or place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}). Name a file in another folder") from None
    if is_folder:
        raise UserError(f"{flag} {path} is a folder. Name a file in it, such as {path / example}")


def beside(target: Path) -> Path:
    """A new folder where `target` is written before `commit` gives it its name. Until then its manifest is empty.

    Whatever a killed run left there of the same target is removed.
    """
    for left in target.parent.glob(f"{glob.escape(target.name)}.*.tmp"):
        if _LEFT.fullmatch(left.name) and is_ours(left):
            remove(left)
    unfinished = _named_beside(target, "tmp")
    unfinished.mkdir(parents=True)
    (unfinished / MANIFEST).write_text("{}")
    return unfinished


def commit(
    unfinished: Path, target: Path, *, manifest: bool = True, known: Mapping[str, Sequence[Piece]] | None = None
) -> None:
    """Flush the folder to disk, and give it the name `target`; it replaces a folder of that name that was written here.

    Args:
        manifest: Seal it with a manifest of hashes, and read all of it back before the old folder goes.
        known: Files that were hashed and flushed as they were written, piece by piece.

    Raises:
        OSError: it could not be written, the disk does not give back what was written, or the name is taken by something
            that was not written here.
    """
    is_taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if is_taken and not is_ours(target):
        raise FileExistsError(errno.EEXIST, f"there is something of that name without a {MANIFEST}", str(target))
    mark = unfinished / MANIFEST
    there = {
        str(path.relative_to(unfinished)): path for path in unfinished.rglob("*") if path.is_file() and path != mark
    }
    sealed = {file: _spans(pieces) for file, pieces in (known or {}).items()}
    others = {file: path for file, path in sorted(there.items()) if file not in sealed}
    for path in others.values():
        flush(path)
    if manifest:
        whole = [(path, 0, None) for path in others.values()]
        hashes = dict(zip(others, _hashes(whole), strict=True)) | sealed
        mark.write_text(json.dumps(hashes, indent=1))
        flush(mark)
    else:
        mark.unlink()
    for path in [*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished]:
        _flush_folder(path)
    if manifest and not is_complete(unfinished, from_disk=True):
        raise OSError(errno.EIO, "the disk does not give back what was written", str(unfinished))
    old = _named_beside(target, "old")
    if is_taken:
        os.replace(target, old)
    os.replace(unfinished, target)
    _flush_folder(target.parent)
    if is_taken:
        with suppress(OSError):  # the new folder is there; `recover` tries again
            remove(old)


def remove(folder: Path) -> None:
    """Remove a folder that was written here. Of one that is half removed when a kill comes, `recover` removes the rest.

    It loses its name first and its manifest last: else what a kill leaves would pass for a folder of somebody else. Of a
    link only the link is removed.
    """
    if folder.is_symlink():
        return folder.unlink()
    gone = folder.rename(_named_beside(folder, "tmp"))
    for path in gone.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MANIFEST:
            path.unlink()
    (gone / MANIFEST).unlink(missing_ok=True)
    gone.rmdir()


def recover(folder: Path) -> None:
    """Tidy up after runs that were killed in the middle of `commit` or `remove`: remove folders that are not whole, give
    others their name back.

    Folders that were not written here stay as they are, whatever their name.
    """
    for path in sorted(folder.glob("*.*")):
        match = _LEFT.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        target = path.with_name(match["name"])
        if match["state"] == "tmp" and not any(path.iterdir()):  # its manifest had not come yet, or was gone
            path.rmdir()
        elif not is_ours(path):
            continue
        elif match["state"] == "tmp" or target.exists():
            remove(path)
        else:
            os.replace(path, target)


def is_ours(folder: Path) -> bool:
    """Whether a folder was written here: it carries a manifest of hashes, or one that is empty or damaged."""
    manifest = _manifest(folder)
    return manifest is not None and (not manifest or _is_manifest(manifest))


def is_complete(folder: Path, *, from_disk: bool = False) -> bool:
    """Whether every file of the manifest is there and unchanged; files and pieces of them are read side by side.

    Args:
        from_disk: Read what is on the disk, not the system's copy in memory.
    """
    hashes = _manifest(folder)
    if not _is_manifest(hashes) or not all((folder / name).is_file() for name in hashes):
        return False
    places: list[_Place] = []
    expected: list[str] = []
    for name, value in hashes.items():
        for start, end, digest in _pieces(value):
            places.append((folder / name, start, end))
            expected.append(digest)
        if isinstance(value, dict) and (folder / name).stat().st_size != places[-1][2]:
            return False
    return _hashes(places, from_disk) == expected


def known_pieces(folder: Path) -> dict[str, list[Piece]]:
    """The files of a complete folder that were hashed piece by piece, for a copy of it."""
    entries = {name: value for name, value in _manifest(folder).items() if isinstance(value, dict)}
    return {
        name: [(start, end or 0, digest) for start, end, digest in _pieces(value)] for name, value in entries.items()
    }


def is_of_the_disk(error: Exception) -> bool:
    """Whether an error says that writing failed. `tokenizers` then raises a bare Exception with a text of Rust's library."""
    return isinstance(error, OSError | SafetensorError) or (type(error) is Exception and "(os error " in str(error))


def flush(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _named_beside(target: Path, state: str) -> Path:
    """A path beside `target` that nobody else uses."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.{state}")


def _manifest(folder: Path) -> Any:
    """The content of a folder's manifest: None if there is none, {} if it is empty or damaged."""
    try:
        return json.loads((folder / MANIFEST).read_bytes()) or {} if (folder / MANIFEST).is_file() else None
    except (ValueError, RecursionError):
        return {}


def _is_manifest(manifest: object) -> bool:
    """Whether it is file name -> SHA-256, or file name -> "START-END" (END exclusive) -> SHA-256, of at least one file."""
    return isinstance(manifest, dict) and bool(manifest) and all(_is_sealed(value) for value in manifest.values())


def _is_sealed(value: object) -> bool:
    """Whether it is a hash, or the hashes of pieces that make up a file without a gap."""
    if not isinstance(value, dict):
        return isinstance(value, str) and bool(_SHA256.fullmatch(value))
    spans = [_SPAN.fullmatch(span) for span in value]
    starts, ends = ([int(span[group]) for span in spans if span] for group in (1, 2))
    joins = bool(spans) and all(spans) and starts == [0, *ends[:-1]]
    return joins and all(isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in value.values())


def _spans(pieces: Sequence[Piece]) -> dict[str, str]:
    """Pieces as a manifest lists them."""
    spans = {f"{start}-{end}": digest for start, end, digest in sorted(pieces)}
    assert _is_sealed(spans), "the pieces of a file leave a gap or overlap"
    return spans


def _pieces(value: str | dict[str, str]) -> list[tuple[int, int | None, str]]:
    """(start, exclusive end or None for the end of the file, SHA-256) of each piece, from a manifest's entry of a file."""
    if isinstance(value, str):
        return [(0, None, value)]
    spans = [(*span.split("-"), digest) for span, digest in value.items()]
    return [(int(start), int(end), digest) for start, end, digest in spans]


def _hashes(places: Sequence[_Place], from_disk: bool = False) -> list[str]:
    with ThreadPoolExecutor(_AT_ONCE) as threads:  # hashing and reading release the interpreter's lock
        return list(threads.map(lambda place: _hash(*place, from_disk=from_disk), places))


def _hash(path: Path, start: int, end: int | None, *, from_disk: bool) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size if end is None else end
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        block = memoryview(bytearray(min(_BLOCK_BYTES, max(1, end - start))))
        while start < end and (count := file.readinto(block[: end - start])):
            digest.update(block[:count])
            start += count
    return digest.hexdigest()


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
