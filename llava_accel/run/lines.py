"""Files of one JSON object a line that a run adds to: metrics.jsonl and its like."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_accel.run.console import Screen
from llava_accel.run.state import TrainState


class Lines:
    """A file that grows by whole lines; those that a full disk keeps back are written when it has room again."""

    def __init__(self, path: Path, screen: Screen) -> None:
        self.path, self._screen = path, screen
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
                self._screen.line(f"{self.path} cannot be written ({error.strerror}); its lines are kept until it can")

    def close(self) -> None:
        """Make sure that nothing is left.

        Raises:
            ValueError: there are lines that could not be written.
        """
        if self._unwritten:
            raise ValueError(
                f"{self.path} lacks its last {len(self._unwritten)} lines: the disk is full or the file cannot be "
                "written. Make room and repeat the command: it goes on from the last checkpoint and writes them anew"
            )


def keep_lines_until(path: Path, state: TrainState) -> None:
    """Drop the lines about steps and evaluations that a resumed run takes again: it writes them anew.

    A run that starts at step 0 keeps none: it evaluates the base anew, too.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines() if state.step else []:
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a killed run may be cut off
            break
        if line["step"] <= (state.evaluated_step if "eval" in line else state.step):
            kept.append(text + "\n")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(kept))
    os.replace(unfinished, path)
