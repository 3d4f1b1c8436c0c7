"""easy-VQA out of its package: in full, and what is said where the package is not in order."""

import importlib.util
from pathlib import Path

import pytest

from llava_accel.converters import easy_vqa
from llava_accel.converters.easy_vqa import easy_vqa_folder, easy_vqa_parts
from llava_accel.sources.problems import DataError


def test_a_missing_package_is_told_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easy_vqa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="python -m pip install easy-vqa"):
        easy_vqa_folder()


def test_a_damaged_package_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"questions\.json: there is no such file\. .*--force-reinstall"):
        list(easy_vqa_parts(tmp_path, tmp_path / "out"))


@pytest.mark.skipif(importlib.util.find_spec("easy_vqa") is None, reason="the package easy-vqa is not installed")
def test_the_real_easy_vqa_converts_in_full(tmp_path: Path) -> None:
    train, test = (
        [row for row in part.rows if isinstance(row, dict)] for part in easy_vqa_parts(easy_vqa_folder(), tmp_path)
    )
    assert (len(train), len(test)) == (38575, 9673)
    assert {row["question_type"] for row in test} == {"shape", "color", "yes-no"}
    answers = {answer for row in test if row["question_type"] == "color" for answer in dict(row["answers"])}  # pyright: ignore
    assert answers == {"green", "red", "gray", "teal", "black", "yellow", "brown", "blue"}
    assert all((tmp_path / "images" / str(name)).is_file() for name in {row["image"] for row in test})
