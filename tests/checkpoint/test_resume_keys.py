"""Which keys of the data make another run of a recipe."""

from pathlib import Path

import pytest

from llava_accel.checkpoint.resume import differences
from llava_accel.recipe import load_recipe

SMALLEST = '[run]\nname = "r"\n[model]\nbase = "b"\n[data]\ntrain = "t.jsonl"\n'


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.columns.image=photo", 'data.columns.image: not set -> "photo"'),
        ("data.labels=original", 'data.labels: "answers" -> "original"'),
        ("data.image_placement=start_if_single", 'data.image_placement: "auto" -> "start_if_single"'),
        ("data.missing_image_mark=start", 'data.missing_image_mark: "error" -> "start"'),
    ],
)
def test_rows_that_are_read_otherwise_make_another_run(tmp_path: Path, override: str, says: str) -> None:
    (tmp_path / "r.toml").write_text(SMALLEST)
    before, now = (load_recipe(tmp_path / "r.toml", some, warns=False) for some in ([], [override]))
    assert differences(before, now) == [says] and differences(now, now) == []
