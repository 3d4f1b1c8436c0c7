"""Where the time of a run goes, the most memory it took, and how fast the device is at best.

On a GPU device events are recorded and read later, so nothing waits for them.
"""

import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Mapping

import torch

PHASES = (
    "data_wait", "copy", "vision", "forward", "backward", "optimizer", "communication", "evaluation", "saving", "other"
)  # fmt: skip
"""Every moment of a run is in one of these. Gradients are summed over ranks during "backward" (and, with sharded weights,
those are gathered during "forward" too): "communication" is the time that the loop itself waits for other ranks."""
APART = ("evaluation", "saving")
"""These do not count for the speed of training."""
_MUCH_WAITING = 0.1


class Phases:
    """Seconds by phase: a stopwatch with laps, so that the phases add up to the whole.

    On a GPU a lap ends when the device comes to that point, which makes "data_wait" the time that the device has nothing
    to do; on a CPU, where calls return when the work is done, the clock decides.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type != "cpu"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._phase, self._since = "other", time.perf_counter()
        self._marks: deque[tuple[str, torch.Event]] = deque()
        self.enter("other")

    def enter(self, phase: str) -> None:
        """From here on time counts for `phase`, one of `PHASES`."""
        assert phase in PHASES, phase
        if self._on_gpu:
            mark = torch.Event(self._device, enable_timing=True)
            mark.record()
            self._marks.append((phase, mark))
            self._read()
            return
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    @property
    def now(self) -> str:
        """The phase that began last."""
        return self._marks[-1][0] if self._marks else self._phase

    def take(self, *, waits: bool = False) -> dict[str, float]:
        """Seconds of each of `PHASES` since the last call.

        Args:
            waits: Wait for the device. Otherwise what it has not reached yet counts for the next call.
        """
        self.enter(self.now)
        if waits and self._marks:
            self._marks[-1][1].synchronize()
            self._read()
        seconds = {phase: self._seconds[phase] for phase in PHASES}
        self._seconds.clear()
        return seconds

    def _read(self) -> None:
        """Add up the laps that the device has finished."""
        while len(self._marks) > 1 and self._marks[1][1].query():
            phase, begun = self._marks.popleft()
            self._seconds[phase] += begun.elapsed_time(self._marks[0][1]) / 1000


def waiting_note(seconds: Mapping[str, float]) -> str:
    """A note for the user if training waits for its data more than a tenth of the time; else empty."""
    training = sum(seconds[phase] for phase in seconds if phase not in APART)
    waited = seconds.get("data_wait", 0.0)
    if waited <= _MUCH_WAITING * training:
        return ""
    return (
        f"{waited / training:.0%} of training's time is spent waiting for data: raise data.workers, use smaller "
        "image files, or let data.cache_features store the features of a frozen tower"
    )


def take_peak(device: torch.device) -> int:
    """The most bytes that this process has taken: of a GPU since the last call, of main memory since its start."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts in bytes, Linux in KiB
    peak = torch.accelerator.max_memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    return peak


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations a second of large square matrix products: what the device can do at best."""
    from torch.utils.benchmark import Timer  # imported here, as it imports setuptools

    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    names = {"torch": torch, "left": left, "right": right}
    timer = Timer("torch.mm(left, right)", globals=names, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=seconds).times)


def wait_for(device: torch.device) -> None:
    """Let the device finish, so that the clock includes its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def duration(seconds: int | float) -> str:
    """A duration for people: in seconds, minutes, or hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
