"""What single expressions do on the emulated device. For the process of worker.py."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from emulated.device import CUDA, Device, Refused


def _names() -> dict[str, Any]:
    names = {"torch": torch, "np": np, "F": F, "CUDA": CUDA, "c": torch.ones(3), "event": torch.Event()}
    arrays = {"x": torch.tensor([1.0, 2.0, 3.0]), "m": torch.eye(3), "n": torch.tensor([0, 1, 2])}
    return names | {name: value.to(CUDA) for name, value in arrays.items()}


def waits_of(expression: str) -> tuple[str, int]:
    """How often an expression waits, and what is refused of it."""
    with Device() as device:
        names = _names()
        before = len(device.waits)
        try:
            eval(expression, names)
        except (Refused, RuntimeError) as error:
            return str(error), 0
        return "", len(device.waits) - before


def ordered(expression: str) -> str:
    """What is refused of an expression where results are to be the same bit for bit."""
    with Device():
        torch.use_deterministic_algorithms(True)
        try:
            eval(expression, _names())
        except Refused as error:
            return str(error)
        finally:
            torch.use_deterministic_algorithms(False)
    return ""


def type_of(expression: str) -> str:
    """Of the result under autocast."""
    with Device(), torch.autocast("cuda", torch.bfloat16):
        return str(eval(expression, _names()).dtype)


def read_early() -> tuple[list[float], list[float]]:
    """A copy that nobody has waited for, before and after a wait."""
    with Device():
        copy = torch.tensor([1.0, 2.0]).to(CUDA).to("cpu", non_blocking=True)
        early = copy.tolist()
        torch.cuda.synchronize()
        return early, copy.tolist()


def asked_early() -> tuple[bool, bool]:
    """Whether an event is over, before and after a wait."""
    with Device():
        event = torch.Event()
        event.record()
        early = event.query()
        torch.cuda.synchronize()
        return early, event.query()


def gradient_of_a_layer() -> tuple[list[float], str, bool]:
    """A layer that is moved, as training does it: its gradient, where it is, and whether it is the same parameter."""
    with Device():
        layer = torch.nn.Linear(2, 1)
        before = layer.weight
        layer.to("cuda")
        layer(torch.ones(1, 2, device="cuda")).sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad[0].tolist(), str(layer.weight.grad.device), layer.weight is before
