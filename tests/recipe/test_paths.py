"""Files and folders that a recipe names and that are not there are said before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from helpers.runs import recipe
from llava_accel.recipe import Recipe, RecipeError
from llava_accel.recipe.paths import refuse_missing


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.jsonl").touch()
    (tmp_path / "images.zip").touch()
    (tmp_path / "images").mkdir()
    return tmp_path


def named(folder: Path, base: str = "org/base", **data: Any) -> Recipe:
    """A recipe whose paths are all there, but for those that are given."""
    sources = {"train": "records.jsonl", "images": "images"} | data
    return recipe(folder, model={"base": base, "vision_tower": "", "adapter": ""}, data=sources)


@pytest.mark.parametrize(
    ("given", "key", "remedy"),
    [
        ({"train": "record.jsonl"}, "data.train", "Did you mean records.jsonl? It was looked for in "),
        ({"train": "other.jsonl"}, "data.train", "Correct it. It was looked for in "),
        ({"eval": "data/val.jsonl"}, "data.eval", "There is no folder data either. Correct it."),
        ({"eval": "data/val.arrow"}, "data.eval", "There is no folder data either. Correct it."),
        ({"train": "images/mine.CSV"}, "data.train", "Correct it. It was looked for in "),
        ({"images": "image"}, "data.images", "Did you mean images?"),
        ({"images": "records.jsonl"}, "data.images", "It is a file. Name the folder that it is in."),
        ({"images": "images.zip"}, "data.images", "It is an archive. Unpack it, and name the folder."),
        ({"images": "~/images"}, "data.images", f"Write {Path.home()}/images."),
        ({"images": "C:\\images"}, "data.images", "with / in place of \\."),
        ({"train": [{"path": "records.jsonl"}, {"path": "/none.jsonl"}]}, "data.train[1].path", "Correct it."),
        ({"train": [{"path": "records.jsonl", "images": "imags"}]}, "data.train[0].images", "Did you mean images?"),
        ({"train": "a-{000..012}.tar"}, "data.train", "Braces are not read. Write a pattern: a-*.tar."),
        ({"train": "hf://datasets/org/name"}, "data.train", "Write org/name, the name"),
        ({"base": "https://huggingface.co/org/base"}, "model.base", "Write org/base, the name"),
        ({"train": "s3://bucket/a.parquet"}, "data.train", "Addresses are not read. Download it"),
        ({"base": "./base"}, "model.base", "Correct it."),
        ({"base": "records.jsonl"}, "model.base", "Name the folder of a model."),
        ({"base": "models/llava/7b"}, "model.base", "There is no folder models/llava either."),
    ],
)
def test_what_is_not_there_is_named_with_its_key_and_a_remedy(
    folder: Path, given: dict[str, Any], key: str, remedy: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        refuse_missing(named(folder, **given), "r.toml")
    (problem,) = caught.value.problems
    assert list(problem.given) == [key] and "There is no such" in problem.expected and remedy in problem.remedy


def test_a_file_of_another_kind_is_refused_with_the_command_that_reads_it(folder: Path) -> None:
    (folder / "a b.CSV").touch()
    with pytest.raises(RecipeError, match=r"prepare csv --file 'a b.CSV' --images images --out data.jsonl\."):
        refuse_missing(named(folder, train="a b.CSV"), "r.toml")
    (folder / "my pics").mkdir()
    with pytest.raises(RecipeError, match="--images DIR --out"):
        refuse_missing(named(folder, train="a b.CSV", images=""), "r.toml")
    with pytest.raises(RecipeError, match="--images 'my pics' --out"):
        refuse_missing(named(folder, train="a b.CSV", images="my pics"), "r.toml")


@pytest.mark.parametrize(
    "given",
    [{}, {"train": "org/name"}, {"train": "none/*.jsonl"}, {"images": "images"}, {"base": "images"}, {"base": "gpt2"}],
)
def test_what_is_there_or_may_be_elsewhere_is_not_refused(folder: Path, given: dict[str, Any]) -> None:
    refuse_missing(named(folder, **given), "r.toml")
