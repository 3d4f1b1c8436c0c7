"""One trainer in a process of its own, whose steps the driver lets through."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

STEPS = Path(__file__).parent
TESTS = STEPS.parents[1]


@dataclass
class Stepper:
    """One trainer in its own process."""

    title: str
    prompt: str
    process: subprocess.Popen[str]
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    """What else the first steps tell."""
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the last of the first steps, with pairs of answers."""
    peak_mib: float = 0.0

    @classmethod
    def start(
        cls, title: str, prompt: str, python: Path, step: str, settings: Mapping[str, str], *paths: Path
    ) -> "Stepper":
        """Start it, with modules from `paths`. What it prints goes to a file beside its output."""
        log = Path(settings["out"]).with_suffix(".log")
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        unbuffered = {"PYTHONUNBUFFERED": "1"}  # it is killed in the end, and its last lines would be lost
        with log.open("w") as lines:
            process = subprocess.Popen(
                [str(python), str(STEPS / step), json.dumps(settings)],
                env=os.environ | offline | unbuffered | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=lines,
                text=True,
                cwd=log.parent,
            )
        return cls(title, prompt, process, log)

    def is_ready(self) -> bool:
        """Wait until all is loaded; False if it has ended instead."""
        self.facts = self.read() or {}
        return bool(self.facts)

    def read(self) -> dict[str, Any] | None:
        """Its next line; None where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def step(self, word: str) -> dict[str, Any]:
        """Let one step through."""
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)
        found = self.read()
        if found is None:
            raise RuntimeError(f"{self.title} has ended in a step:\n{tail(self.log)}")
        self.peak_mib = max(self.peak_mib, found["peak_mib"])
        return found

    def warm_up(self, *words: str) -> None:
        """The first steps: they are not timed, and tell their losses."""
        self.figures = [self.step(word) for word in words]
        self.losses = [found["loss"] for found in self.figures]

    def stop(self) -> None:
        """End it; nothing is saved."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def tail(log: Path) -> str:
    """The end of what a process printed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:])
