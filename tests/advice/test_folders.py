"""The obvious folder of the images is found, and no other."""

from pathlib import Path

import pytest

from helpers.samples import corpus, record
from llava_accel.advice.folders import find_folder, folder_remarks
from llava_accel.data.survey import survey


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("set/data/images", "set/data/other", "set/pictures", "set/data/z"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path / "set"


@pytest.mark.parametrize("where", ["data/images", "data/other", "pictures", "", "data/z"])
def test_the_folder_that_holds_the_images_is_found(place: Path, where: str) -> None:
    (place / where / "a.png").touch()
    assert find_folder(["a.png", "gone.png"], place / "data") == place / where


def test_the_folder_that_holds_most_wins(place: Path) -> None:
    for name in ("data/images/a.png", "data/z/a.png", "data/z/b.png"):
        (place / name).touch()
    assert find_folder(["a.png", "b.png"], place / "data") == place / "data/z"


def test_nothing_is_said_where_images_lie_beside_the_data(place: Path) -> None:
    for folder in ("data", "data/images"):
        (place / folder / "a.png").touch()
    assert find_folder(["a.png"], place / "data") is None


def test_nothing_is_said_where_there_are_none(place: Path) -> None:
    assert find_folder(["a.png"], place / "data") is None


def test_whole_paths_lead_to_the_folder_above_all(place: Path) -> None:
    names = [place / "pictures/a.png", place / "data/z/b.png"]
    for name in names:
        name.touch()
    assert find_folder([str(name) for name in names], place / "data/other") == place


def test_where_images_are_that_were_not_found_is_said(place: Path) -> None:
    (place / "pictures" / "a.png").touch()
    for name, said in (
        ("a.png", [f"images that are missing are in {place}/pictures: set data.images={place}/pictures"]),
        ("b", []),
    ):
        data = corpus(place, [record("Q", "A"), record("<image>Q", "A", image=name)])
        assert folder_remarks(data, survey(data, workers=0, decode=False)) == said
