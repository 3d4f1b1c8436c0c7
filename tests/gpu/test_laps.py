"""The clock of a run on a GPU."""

import time

import pytest
import torch

from llava_accel.runtime.timing import Phases


def test_laps_of_a_device_are_read_without_waiting_for_it() -> None:
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    torch.mm(work, work)
    torch.cuda.synchronize()
    phases = Phases(device)
    begun = time.perf_counter()
    phases.enter("forward")
    for _ in range(50):
        work = torch.mm(work, work) / 4096
    phases.enter("backward")
    entered = time.perf_counter() - begun
    found, passed = phases.take(), time.perf_counter() - begun
    assert entered < 0.5 * found["forward"]
    assert sum(found.values()) == pytest.approx(passed, rel=0.1)
