"""Where the time of a step goes. On a GPU device events are recorded and read later, so nothing waits for them."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Seconds by phase. On a CPU, where calls return when the work is done, the clock does.

    Args:
        device: Of the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str, *, on_host: bool = False) -> Iterator[None]:
        """Count the time of a block under `name`.

        Args:
            on_host: It is work of the host, such as waiting for data, whatever the device does meanwhile.
        """
        if self._on_gpu and not on_host:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((name, first, last))
            return
        since = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - since

    def seconds(self) -> dict[str, float]:
        """What has been counted. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for name, first, last in self._events:
            self._seconds[name] += first.elapsed_time(last) / 1000
        self._events = []
        return dict(self._seconds)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Floating-point operations a second of large square matrix products: what the device can do at best."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        wait_for(device)
        since = time.perf_counter()
        for _ in range(3):
            torch.mm(left, right)
        wait_for(device)
        best = max(best, 3 * 2 * size**3 / (time.perf_counter() - since))
    return best


def wait_for(device: torch.device) -> None:
    """Let the device finish, so that the clock tells its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
