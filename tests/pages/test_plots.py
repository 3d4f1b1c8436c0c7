"""A plot has room for its curves, however many they are and whatever they are called."""

import re

import pytest

from llava_accel.pages.plots import Plot, Series
from llava_accel.scoring.metrics import SCORES


def height(titles: list[str]) -> float:
    series = [Series(label=title, steps=[0, 2], values=[0.1, 0.2], is_sparse=True) for title in titles]
    found = re.search(r'viewBox="0 0 \S+ (\S+)"', Plot(title="Score", note="", series=series, steps={"best": 2}).svg)
    assert found
    return float(found[1])


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize("titles", [list(SCORES.values()), [f"{'a long name of a run ' * 3}{n}" for n in range(10)]])
def test_many_curves_make_a_plot_higher_and_not_flat(titles: list[str]) -> None:
    assert height(titles) > height(titles[:2]) + 50  # and no warning that nothing is left of the axes
