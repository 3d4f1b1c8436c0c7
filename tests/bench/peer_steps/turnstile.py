"""Lets a trainer's steps through one at a time, each at a word on standard input, and tells on a line what it took.

Nothing here but Python's own library: it runs in the environment of every peer.
"""

import json
import os
import re
import sys
import time
from pathlib import Path


def memory_mib(name: str) -> float:
    """A line of /proc/self/status: "VmRSS", or "VmHWM", the most of it since it was last forgotten."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def settings() -> dict[str, str]:
    """What the driver wants of this process: `base`, `rows`, `out`, `batch`, `dropout` and more, all of them strings."""
    return json.loads(sys.argv[1])


def rows() -> list[dict[str, str]]:
    """The examples: `image` (a path), `question`, `answer` and `rejected`, a worse answer."""
    return json.loads(Path(settings()["rows"]).read_text())


NUM_LOSSES = 3
"""Steps whose losses are logged. They are compared and not timed; later steps log nothing."""
PAIRS: dict[str, dict[str, float | str]] = {
    "sigmoid": {},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "rpo": {"sft_weight": 0.5},
    "mpo": {"loss_weight": 0.8, "bco_weight": 0.2, "sft_weight": 1.0},
}
"""What --pairs may name: keys of [preference]."""


def plain_name(name: str) -> str:
    """The name of a trained weight without what peft wraps around it: "language_model.layers.0...q_proj.lora_A.weight"."""
    parts = re.sub(r"\.(modules_to_save|default)\b", "", name).split(".")
    roots = [parts.index(root) for root in ("language_model", "multi_modal_projector") if root in parts]
    return ".".join(parts[min(roots) :])


class Turnstile:
    """One for a process. From here on, whatever prints to standard output prints to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def ready(self, **facts: object) -> None:
        """All is loaded: tell it, and forget the memory that loading took."""
        self._tell(memory_mib=memory_mib("VmRSS"), peak_mib=memory_mib("VmHWM"), **facts)
        Path("/proc/self/clear_refs").write_text("5")

    def next(self) -> str:
        """Wait for the driver's word. "stop", or its end, ends the process at once: nothing is to be saved."""
        word = sys.stdin.readline().strip()
        if word in ("", "stop"):
            os._exit(0)
        return word

    def start(self) -> None:
        """The clocks of a step begin."""
        self._since = time.perf_counter(), time.process_time()

    def passed(self, loss: float | None = None, **figures: object) -> None:
        """A step has ended: tell its seconds on the clock and on all cores, and the most memory so far."""
        seconds, cpu_seconds = time.perf_counter() - self._since[0], time.process_time() - self._since[1]
        self._tell(seconds=seconds, cpu_seconds=cpu_seconds, peak_mib=memory_mib("VmHWM"), loss=loss, **figures)

    def _tell(self, **values: object) -> None:
        print(json.dumps(values), file=self._out, flush=True)
