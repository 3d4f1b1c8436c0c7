"""The cache: where it is, and files in it that are read if they are whole, and made anew if they are not.

If the cache cannot be written, a note says so, and the run goes on.
"""

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from llava_accel.console.output import note
from llava_accel.exceptions import UserError, in_short
from llava_accel.storage.atomic import atomic_file, is_of_the_disk

_KINDS = {
    "tables": (r"[0-9a-f]{20}\.arrow", "records of data files"),
    "embedded": (r"[0-9a-f]{20}\.images", "images out of data files"),
    "downloads": (r"[0-9a-f]{32}", "images from the network"),
    "urls": (r"[0-9a-f]{20}\.json", "addresses of images"),
    "surveys": (r"[0-9a-f-]+\.arrow", "lengths and errors of records"),
    "images": (r"[0-9a-f]{24}\.arrow", "digests of image files"),
    "splits": (r"[0-9a-f]{24}\.npy", "held-out shares"),
    "towers": (r"[0-9a-f]{64}", "names of vision towers"),
    "reference": (r"[0-9a-f]{32}\.safetensors", "log-probabilities of pairs before training"),
    "features": (r"[0-9a-f]{32}\.safetensors", "features of tower"),
}
"""Folders of the cache, the names of the files in each, and what they are."""
_T = TypeVar("_T")


def cache_folder(cache_dir: str = "") -> Path:
    """The folder of the cache, which is made if it is not there, for the user alone: `cache_dir`; if that is empty,
    `llava_accel` in XDG_CACHE_HOME or `~/.cache`; if that cannot be made, a folder among the temporary files.

    Raises:
        UserError: `cache_dir`, or else the last of these, cannot be used.
    """
    if cache_dir:
        folder = Path(cache_dir)
    elif (folder := _user_cache()) is None:
        return _temporary_cache("the user has no home folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        if not cache_dir:
            return _temporary_cache(f"{folder} cannot be made ({error.strerror})")
        raise UserError(
            f"data.cache_dir: {folder} cannot be made ({error.strerror}). Name a folder that can be written"
        ) from None
    return folder


def contents(folder: Path) -> dict[str, list[Path]]:
    """The files of a cache by what they are; files with other names than ours are left out."""
    by_kind: dict[str, list[Path]] = {}
    for place, (name, what) in _KINDS.items():
        for file in sorted((folder / place).glob("*/*" if place == "features" else "*")):
            if re.fullmatch(rf"{name}(\.[0-9a-f]{{32}}\.tmp)?", file.name) and file.is_file():
                inner = f" {file.parent.name}" if place == "features" else ""
                by_kind.setdefault(f"{what}{inner}", []).append(file)
    return by_kind


def stored(path: Path, read: Callable[[Path], _T]) -> _T | None:
    """The result of `read` on a file of the cache; None if there is none, or if it is damaged, which a note says."""
    try:
        if not path.stat().st_size:  # which cannot be mapped
            raise ValueError("it is empty")
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        note(f"{path} is damaged ({in_short(error)}) and is made anew")
        return None


def file_status(path: Path | str) -> tuple[int, int, int]:
    """Size, mtime and ctime of a file, of which some differ once it has changed; -1 each if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1, -1
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def store(path: Path, write: Callable[[Path], object]) -> bool:
    """Let `write` make a file of the cache; False if it cannot be written, which a note says."""
    try:
        with atomic_file(path, is_private=True) as unfinished:
            write(unfinished)
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        note(f"data.cache_dir: {path} cannot be written ({in_short(error)}); the run goes on without it")
        return False
    return True


@cache
def spare_folder() -> Path:
    """A folder for this process alone, removed at its end, for files that are needed but cannot be kept.

    Raises:
        UserError: there is no room for temporary files either.
    """
    try:
        folder = tempfile.mkdtemp(prefix="llava_accel-")
    except OSError as error:
        raise UserError(
            f"data.cache_dir: it cannot be written, and neither can {tempfile.gettempdir()} ({error.strerror}). Name a "
            "folder with free space in data.cache_dir"
        ) from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _user_cache() -> Path | None:
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # its specification says to ignore a relative path
        return Path(named) / "llava_accel"
    try:
        return Path.home() / ".cache" / "llava_accel"
    except RuntimeError:  # neither HOME nor an entry for this user
        return None


def _temporary_cache(reason: str) -> Path:
    folder = Path(tempfile.gettempdir()) / f"llava_accel-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        is_own = folder.lstat().st_uid == os.getuid() and not folder.is_symlink()  # anybody may make a folder there
    except OSError:
        is_own = False
    if not is_own:
        raise UserError(f"data.cache_dir: {reason}, and {folder} cannot be used. Name a folder that can be written")
    note(f"data.cache_dir: {reason}; the cache is in {folder}")
    return folder
