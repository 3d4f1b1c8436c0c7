"""The writer's thread does one thing after the other, and its errors and the memory that it may take are known."""

import threading
from pathlib import Path

import pytest

from llava_accel.checkpoint.background import Background, _left_of_limits, free_main_memory


def test_work_is_done_in_order_while_others_go_on() -> None:
    background, gate, done = Background(), threading.Event(), list[int]()
    background.start(lambda: (gate.wait(10), done.append(1)))
    background.start(lambda: done.append(2))
    assert background.is_busy and not background.wait(0.05) and done == []
    gate.set()
    background.finish()
    assert done == [1, 2] and not background.is_busy and background.wait(0.0)


def test_an_error_is_raised_where_somebody_waits_and_nothing_more_is_done() -> None:
    background, done = Background(), list[int]()
    background.start(lambda: [][0])
    background.start(lambda: done.append(1))
    assert background.wait(10.0)
    with pytest.raises(IndexError):
        background.finish()
    assert done == []


def group(folder: Path, most: str, current: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_the_limits_of_a_container_or_a_job_count(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("1:name=x:/else\n0::/job/step\n")
    group(root / "job" / "step", "max", 70, 0)
    group(root / "job", "100", 70, 20)
    assert _left_of_limits(root, own) == [50]
    own.write_text("0::/\n")
    assert _left_of_limits(root, own) == []
    group(root, "90", 80, 0)
    assert _left_of_limits(root, own) == [10]
    assert _left_of_limits(root, tmp_path / "none") == [10]
    assert free_main_memory() > 0
