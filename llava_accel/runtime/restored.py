"""Restores after a run what it set for the whole process, so that others may follow in a notebook."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_accel.runtime.determinism import VARIABLES

_groups: list[object] = []
"""Process groups of the run, with their threads. DDP and others keep them too, and where the last to let go is not Python,
these threads are joined while Python's lock is held: one that waits for the lock would hang the process at its end."""


def keep_process_group() -> None:
    """Keep this process's group, if there is one, until the run and all that it has built are gone."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        _groups.append(distributed.group.WORLD)


@contextmanager
def settings_restored() -> Iterator[None]:
    """Around a run, however it ends: restores the choice of deterministic kernels (`determinism.py`) and of matmul's, and
    lets go of the process group."""
    variables = {name: os.environ.get(name) for name in VARIABLES}
    is_ordered = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    chooses, rounds = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        _groups.clear()
        torch.use_deterministic_algorithms(is_ordered, warn_only=warns)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = chooses, rounds
        for name, value in variables.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}
