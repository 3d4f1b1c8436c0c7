"""JSON lines on disk: written whole or not at all, and read by their line feeds alone."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_accel.console.output import Console
from llava_accel.exceptions import UserError


def write_json_lines(rows: Iterable[Mapping[str, object]], out: Path) -> int:
    """Write one JSON object a line, in UTF-8, and return how many.

    `rows` may be a generator that raises half-way: the new file takes its place at the end.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    count = 0
    try:
        # Half a surrogate pair cannot be encoded; Python's backslash form of it is also JSON's.
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return count


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_json_lines` wrote. `str.splitlines` would also cut at U+2028 and others, which texts may hold.

    Raises:
        UserError: a line is no JSON.
    """
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]


class Lines:
    """A file that grows by whole lines; those that a full disk keeps back are written when it has room again."""

    def __init__(self, path: Path, console: Console) -> None:
        self.path, self._console = path, console
        self._unwritten: list[str] = []

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one more line."""
        self._unwritten.append(json.dumps(line) + "\n")
        end = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self._unwritten))
            self._unwritten = []
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, end)  # no half lines
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
                "written. Make room and repeat the command: it goes on from the last checkpoint and writes them anew"
            )


def keep_lines_until(path: Path, step: int, evaluated_step: int) -> None:
    """Drop the lines about steps and evaluations that a resumed run takes again: it writes them anew.

    A run that starts at step 0 keeps none: it evaluates the base anew, too.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines() if step else []:
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a killed run may be cut off
            break
        if line["step"] <= (evaluated_step if "eval" in line else step):
            kept.append(text + "\n")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(kept))
    os.replace(unfinished, path)
