"""Picks a few of many things, so that they come from all of them."""

import numpy as np


def spread(number: int, most: int) -> list[int]:
    """At most `most` of the places 0 to `number` - 1, at equal distances, the first and the last among them."""
    return np.linspace(0, number - 1, min(most, number)).astype(int).tolist()
