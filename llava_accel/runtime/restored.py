"""Restores after a run what it set for the whole process, so that others may follow in a notebook."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_accel.runtime.determinism import VARIABLES


@contextmanager
def settings_restored() -> Iterator[None]:
    """Around a run, however it ends: restores the choice of deterministic kernels (`determinism.py`) and of matmul's."""
    variables = {name: os.environ.get(name) for name in VARIABLES}
    is_ordered = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    chooses, rounds = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_ordered, warn_only=warns)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = chooses, rounds
        for name, value in variables.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}
