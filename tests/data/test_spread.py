"""A few of many come from all of them."""

import pytest

from llava_accel.data.spread import spread


@pytest.mark.parametrize(("number", "least_last"), [(59, 58), (60, 59), (61, 59), (119, 117), (1000, 983)])
def test_what_is_shown_of_many_comes_from_all_of_them(number: int, least_last: int) -> None:
    shown = spread(number, 60)
    assert len(set(shown)) == min(60, number) and shown == sorted(shown)
    assert shown[0] == 0 and shown[-1] >= least_last
    assert not spread(0, 60)
