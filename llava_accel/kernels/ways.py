"""Gives a module another way to compute than that of its class."""

from functools import cache

from torch import nn


def compute_by(module: nn.Module, way: type[nn.Module]) -> None:
    """Let a module compute by the class `way`, whose methods come before those of its own class.

    Its weights, its hooks and the name of its class stay.
    """
    module.__class__ = _derived(way, type(module))


@cache  # modules of one class stay of one class
def _derived(way: type[nn.Module], known: type[nn.Module]) -> type[nn.Module]:
    return type(known.__name__, (way, known), {})
