"""Finds the images most similar to given ones by the vision tower's features. Holds few of them in memory at a time."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

_AT_ONCE = 1024  # images


class Near(NamedTuple):
    """One of the images that were looked through."""

    number: int
    similarity: float
    """The cosine of the means over all tokens."""


def nearest(
    asked: Sequence[Float[Tensor, " channels"]], known: Iterable[tuple[int, Float[Tensor, " channels"]]], most: int
) -> list[list[Near]]:
    """For each of `asked` the nearest of `known`, the nearest first.

    Args:
        known: A number of its own for each image, and its features.
        most: How many to find.
    """
    if not asked:
        return []
    wanted = normalize(torch.stack(list(asked)), dim=1)
    values, numbers = torch.empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64)
    left = iter(known)
    while some := list(islice(left, _AT_ONCE)):
        features = normalize(torch.stack([each for _, each in some]), dim=1)
        values = torch.cat([values, wanted @ features.T], dim=1)
        numbers = torch.cat([numbers, torch.tensor([number for number, _ in some]).expand(len(asked), -1)], dim=1)
        values, places = values.topk(min(most, values.shape[1]), dim=1)
        numbers = numbers.gather(1, places)
    return [list(map(Near, *each)) for each in zip(numbers.tolist(), values.tolist(), strict=True)]
