"""Modules that go on to compute in another way than that of their class."""

from functools import cache

from torch import nn


def compute_by(module: nn.Module, way: type[nn.Module]) -> None:
    """Let a module compute as the class `way` says, whose methods come before its own class's.

    Its weights, its hooks and the name of its class stay.
    """
    module.__class__ = _derived(way, type(module))


@cache  # modules of one class go on to be of one class
def _derived(way: type[nn.Module], known: type[nn.Module]) -> type[nn.Module]:
    return type(known.__name__, (way, known), {})
