"""The run folder: checks that it is a run's, locks it, and writes the recipe, the environment and the end into it."""

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator

from llava_accel.exceptions import Interrupted, UserError, in_short
from llava_accel.model.precision import precision_name
from llava_accel.recipe import Recipe, dump_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.devices import device_name
from llava_accel.runtime.engines import resolve_precision
from llava_accel.runtime.invocation import typed_line
from llava_accel.sources.problems import some
from llava_accel.storage.atomic import MANIFEST, atomic_file, is_ours
from llava_accel.storage.folder_lock import LOCK, FolderLock, is_lock
from llava_accel.storage.run_weights import complete_checkpoints, named_checkpoints

_PACKAGES = (
    "llava-accel", "torch", "accelerate", "transformers", "peft", "bitsandbytes", "deepspeed", "tokenizers",
    "safetensors", "pillow", "numpy", "pyarrow",
)  # fmt: skip
_LOGS = (".log", ".out", ".err")  # suffixes that no file of a run has
ENVIRONMENT = "environment.json"
ENDED = "ended.json"
"""How the run ended; missing while it runs, and after a kill."""
SKIPPED = "skipped.txt"
"""Records that are left out; `cache` and `evaluate` write it as well."""


Ending = Literal["finished", "patience", "signal", "error"]
_locks: list[FolderLock] = []
_before_release: list[Callable[[], None]] = []
_opened: list[Path] = []
"""Folders whose run has begun: a run that is refused earlier keeps what an earlier run has noted."""


@contextmanager
def run_folders_unlocked() -> Iterator[None]:
    """Wrap a run: however it ends, its folder is unlocked then, and an error is noted in it."""
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        reason = in_short(error) if isinstance(error, UserError) else type(error).__name__
        is_asked = isinstance(error, KeyboardInterrupt)
        for folder in _opened:
            write_end(folder, "signal" if is_asked else "error", "SIGINT" if is_asked else reason)
        raise
    finally:
        _opened.clear()
        while _before_release:
            _before_release.pop()()
        while _locks:
            _locks.pop().release()


def before_release(work: Callable[[], None]) -> None:
    """Let `run_folders_unlocked` do `work`, which still writes to the folder, before it unlocks it, however the run ends."""
    _before_release.append(work)


def write_end(folder: Path, how: Ending, detail: str = "") -> None:
    """Note in a run folder how its run ended, for the report. For the main process."""
    with suppress(OSError), atomic_file(folder / ENDED) as unfinished:  # the disk may be what has ended it
        unfinished.write_text(json.dumps({"how": how, "detail": detail}) + "\n")


def lock_run_folder(run: RunContext) -> None:
    """Make the run folder, and keep other processes from writing it. Every rank must call it.

    Raises:
        UserError: it cannot be written, another process writes it, or it holds what no run has written.
    """
    folder = Path(run.recipe.run.output_dir)
    if run.accelerator.is_main_process:
        check_folder(folder)
        lock = FolderLock(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.take(run.console.line)
        except OSError as error:
            raise _not_writable(folder, error) from None
        _locks.append(lock)
    run.accelerator.wait_for_everyone()


def write_run_files(recipe: Recipe, accelerator: Accelerator) -> None:
    """Write recipe.toml and environment.json into the run folder; UserError if it cannot be written."""
    folder = Path(recipe.run.output_dir)
    if accelerator.is_main_process:
        try:
            with atomic_file(folder / ENVIRONMENT) as unfinished:
                unfinished.write_text(json.dumps(environment(recipe, accelerator), indent=2) + "\n")
            with atomic_file(folder / "recipe.toml") as unfinished:
                unfinished.write_text(dump_recipe(recipe), encoding="utf-8")
            (folder / ENDED).unlink(missing_ok=True)
            _opened.append(folder)
        except OSError as error:
            raise _not_writable(folder, error) from None
    accelerator.wait_for_everyone()


def check_folder(folder: Path) -> None:
    """Raise UserError if a run folder cannot be made and written, or holds what no run has written. It changes nothing."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.is_symlink() or place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
        others = [path.name for path in folder.iterdir() if not _is_incidental(path)] if folder.is_dir() else []
        is_run = not others or _is_run(folder)
        results = (folder / "best", folder / "export", *named_checkpoints(folder / "checkpoints"))
        foreign = [path for path in results if path.exists() and not is_ours(path)]
    except OSError as error:
        raise _not_writable(folder, error) from None
    if not is_run:
        raise UserError(
            f"run.output_dir: {folder} holds {some(sorted(others))}, and no run has written it (it has no {ENVIRONMENT} of "
            "one). Choose a new or an empty folder; nothing in this one was touched"
        )
    if foreign:
        raise UserError(
            f"run.output_dir: {foreign[0]} was not written by a run (it has no {MANIFEST} of one), and this run would write "
            "in its place. Move it elsewhere, or choose another run.output_dir"
        )


def _is_run(folder: Path) -> bool:
    """Whether a run has written here: the environment of one, its lock, or its checkpoints."""
    try:
        environment = json.loads((folder / ENVIRONMENT).read_bytes())
    except (OSError, ValueError, RecursionError):
        environment = None
    is_marked = isinstance(environment, dict) and {"packages", "backend", "num_processes"} <= environment.keys()
    return is_marked or is_lock(folder / LOCK) or bool(complete_checkpoints(folder / "checkpoints"))


def _is_incidental(path: Path) -> bool:
    """Whether a file belongs to a lock, another verb or the system, or is a log, such as the one that this process prints
    to."""
    if path.name.startswith((LOCK, ".")) or path.name in (SKIPPED, "lost+found") or path.suffix in _LOGS:
        return True
    printed: list[os.stat_result] = []
    for stream in (1, 2):
        with suppress(OSError):  # closed
            printed.append(os.fstat(stream))
    return path.is_file() and any(os.path.samestat(path.stat(), one) for one in printed)


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"run.output_dir: {folder} cannot be written ({error.strerror}). Choose another folder")


def environment(recipe: Recipe, accelerator: Accelerator) -> dict[str, object]:
    """Versions, hardware, backend and commit: what it takes to repeat the run."""
    device = accelerator.device
    dtype = resolve_precision(recipe.run.precision, device)
    return {
        "command": typed_line(),
        "python": platform.python_version(),
        "packages": versions(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": str(device) if device.type == "cpu" else device_name(device),
        "backend": str(accelerator.distributed_type.value),
        "num_processes": accelerator.num_processes,
        "mixed_precision": "no" if dtype == torch.float32 else precision_name(dtype),
        "git_commit": _git_commit(),
    }


@cache
def versions() -> dict[str, str]:
    """The packages that a run depends on and that are installed, with their versions."""
    installed: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None when it was installed from a wheel."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():  # an installation may lie in a checkout of something else
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git, or one that may not be started
        return None
