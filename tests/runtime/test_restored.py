"""What a run leaves behind in its process."""

from pathlib import Path

import pytest
from torch import distributed

from llava_accel.runtime import restored
from llava_accel.runtime.restored import keep_process_group, settings_restored


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_group_is_kept_until_the_run_has_ended(tmp_path: Path, fails: bool) -> None:
    """Else DDP may be the last to let go of it, and join its threads in a way that can hang the process."""
    try:
        with settings_restored():
            distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
            keep_process_group()
            group = distributed.group.WORLD
            distributed.destroy_process_group()
            assert restored._groups == [group]
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert not restored._groups


def test_one_process_without_a_group_keeps_none() -> None:
    with settings_restored():
        keep_process_group()
        assert not restored._groups
