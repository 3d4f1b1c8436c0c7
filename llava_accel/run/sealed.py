"""Which folders hold a whole checkpoint: sealed with a manifest of hashes, and unchanged since."""

import hashlib
import json
import os
import re
from pathlib import Path

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. Unfinished ones have another name and are not seen."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def seal(folder: Path) -> None:
    """Flush every file to disk and write the manifest with their hashes."""
    hashes: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            hashes[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    with (folder / MANIFEST).open("w") as file:
        json.dump(hashes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def is_complete(folder: Path) -> bool:
    """Whether every file of the manifest is there and unchanged."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except ValueError:  # damaged itself
        return False
    for name, digest in hashes.items():
        path = folder / name
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return False
    return True
