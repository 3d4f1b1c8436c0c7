"""JSON lines on disk: written whole or line by line, and split only at line feeds when they are read."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_accel.console.output import Console
from llava_accel.exceptions import UserError
from llava_accel.storage.atomic import atomic_file


def write_json_lines(rows: Iterable[Mapping[str, object]], out: Path) -> int:
    """Write one JSON object per line, in UTF-8, and return how many.

    `rows` may be a generator that raises half-way: the new file takes its place at the end.
    """
    count = 0
    # Half a surrogate pair cannot be encoded; Python's backslash form of it is also JSON's.
    with (
        atomic_file(out) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_json_lines(path: Path, *, may_be_damaged: bool = False) -> list[Any]:
    """The objects of a file. `str.splitlines` would also cut at U+2028 and others, which texts may hold.

    Args:
        may_be_damaged: Lines may be incomplete or damaged, as after a kill or a power cut; they are left out.

    Raises:
        ValueError: a line is not JSON.
    """
    lines: list[Any] = []
    for text in path.read_bytes().split(b"\n"):
        try:
            lines += [json.loads(text)] if text.strip() else []
        except (ValueError, RecursionError):
            if not may_be_damaged:
                raise
    return lines


def append_whole(path: Path, text: str) -> None:
    """Append all lines to a file, whose last line may lack its end; or none of them, and OSError, if there is no room."""
    end = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a+b") as file:
            file.seek(max(0, end - 1))
            file.write((b"\n" if file.read() not in (b"", b"\n") else b"") + text.encode())
    except OSError:
        if path.exists():
            os.truncate(path, end)  # no half lines
        raise


class Lines:
    """A file that grows by whole lines; those that a full disk keeps back are written when it has room again."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self._console = path, console
        self._unwritten: list[str] = []

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one more line."""
        self._unwritten.append(json.dumps(line) + "\n")
        try:
            append_whole(self.path, "".join(self._unwritten))
            self._unwritten = []
        except OSError as error:
            if len(self._unwritten) == 1:
                self._console.line(f"{self.path} cannot be written ({error.strerror}); its lines are kept until it can")

    def close(self) -> None:
        """Make sure that nothing is left.

        Raises:
            UserError: there are lines that could not be written.
        """
        if self._unwritten:
            raise UserError(
                f"{self.path} lacks its last {len(self._unwritten)} lines: the disk is full or the file cannot be "
                "written. Make room and repeat the command: it goes on from the last checkpoint and writes them again"
            )


def keep_lines_until(path: Path, step: int, say: Callable[[str], None] = lambda _: None) -> int:
    """Drop the lines about steps that a resumed run takes again: it writes them again.

    A run that starts at step 0 keeps none: it evaluates the base again, too.

    Args:
        say: Called if lines are damaged or were not written by a run; these are dropped as well.

    Returns:
        Number of lines that are left.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for text in path.read_bytes().split(b"\n") if step else ():
        line = _line_of_a_run(text)
        if line is None:
            dropped += bool(text.strip())
        elif line["step"] <= step:
            kept.append(line)
    if dropped:
        say(f"{path}: {dropped} lines were damaged or not written by a run, and were dropped")
    write_json_lines(kept, path)
    return len(kept)


def _line_of_a_run(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_of_a_run = isinstance(line, dict) and type(line.get("step")) is int and isinstance(line.get("eval", {}), dict)
    return line if is_of_a_run else None
