"""What `check` tells of records that can be used: lengths, answers, images, and what evaluation has of training."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.samples import corpus_of, record, write_lines
from llava_accel.data.survey import survey
from llava_accel.inspection.data_facts import Checked, answer_shares, examples_of_errors, length_shares, numbers
from llava_accel.inspection.overlap import overlap
from llava_accel.inspection.repeated_ids import repeated_id, repeated_ids
from llava_accel.inspection.summary import image_remarks
from llava_accel.recipe import make_recipe


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.png, the same under another name, and another image of the same size."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
    for name, image in zip(("a.png", "b.png"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    shutil.copy(tmp_path / "a.png", tmp_path / "copy of a.png")
    return tmp_path


def checked(folder: Path, name: str, rows: Sequence[dict[str, object]]) -> Checked:
    data = corpus_of(write_lines(folder / f"{name}.jsonl", list(rows)))
    found = survey(data, workers=0, decode=True)
    return Checked(name=name, corpus=data, survey=found, processing=None, repeated=repeated_ids(data, found))


def asked(image: str, question: str = "Q", answer: str = "A") -> dict[str, object]:
    return record(f"<image>\n{question}", answer, image=image)


def test_a_copy_under_another_name_is_no_different_image(images: Path) -> None:
    rows = [asked("a.png"), asked("copy of a.png"), asked("b.png"), asked("a.png", "another"), record("Q", "A")]
    assert numbers(checked(images, "data.train", rows))["images"] == "4 shown, 2 different"


@pytest.mark.parametrize(("exif", "says"), [("ignore", "read as they are stored"), ("apply", "They are turned")])
def test_images_that_are_turned_or_transparent_are_counted(images: Path, exif: str, says: str) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    for number in range(2):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(images / f"{number}.jpg", exif=orientation)
    Image.new("RGB", (8, 6), (9, 9, 9)).save(images / "clear.png", transparency=(9, 9, 9))
    shown = ("a.png", "0.jpg", "1.jpg", "1.jpg", "clear.png")
    found = checked(images, "data.train", [asked(name) for name in shown]).survey
    tables = {"run": {"name": "t"}, "model": {"base": "b"}, "data": {"train": "t.json", "exif": exif}}
    turned, transparent = image_remarks(found, make_recipe(tables).data)
    assert turned.startswith("2 images have an EXIF orientation") and says in turned
    assert transparent.startswith("1 images are transparent")


def test_tiles_are_told_where_images_are_cut(images: Path) -> None:
    whole = checked(images, "data.train", [asked("a.png"), asked("b.png")])
    assert not [name for name in numbers(whole) if "tiles" in name]
    cut = replace(whole, survey=replace(whole.survey, num_tiles=np.array([5, 3], dtype=np.int32)))
    assert numbers(cut)["tiles of images shown"] == "8"


def test_an_image_of_several_sets_is_one_image(images: Path) -> None:
    both = record("<image><image>\nQ", "A", image=["a.png", "b.png"])
    assert numbers(checked(images, "data.train", [both, asked("b.png")]))["images"] == "3 shown, 2 different"


def test_the_evaluations_images_of_training_are_found_by_what_they_hold(images: Path) -> None:
    training = checked(images, "data.train", [asked("b.png", "other"), asked("a.png", "red?"), record("text?", "A")])
    rows = [asked("copy of a.png", "red?"), asked("copy of a.png", "new"), record("text?", "B"), record("new", "B")]
    evaluation = checked(images, "data.eval", rows)
    of_images, of_questions = overlap(training, training.survey.usable, evaluation, evaluation.survey.usable)
    assert "2 of 4 evaluation records show an image that training shows too" in of_images
    assert "(1 with the same question)" in of_images
    assert "data.eval.jsonl, row 1, whose image is that of" in of_images and "data.train.jsonl, row 2." in of_images
    assert of_questions.startswith("2 of 4 evaluation records have the question of a training record")


def test_data_that_share_nothing_are_not_noted(images: Path) -> None:
    training = checked(images, "data.train", [asked("b.png", "one"), record("two", "A")])
    evaluation = checked(images, "data.eval", [asked("a.png", "three"), record("four", "A")])
    assert overlap(training, training.survey.usable, evaluation, evaluation.survey.usable) == []


def test_only_rows_of_the_two_sides_count(images: Path) -> None:
    data = checked(
        images, "data.train", [asked("a.png", "one"), asked("b.png", "two"), asked("copy of a.png", "three")]
    )
    assert overlap(data, np.array([0]), data, np.array([1])) == []
    assert len(overlap(data, np.array([0, 1]), data, np.array([2]))) == 1


def test_answers_are_counted_as_the_last_turns_say_them(tmp_path: Path) -> None:
    rows = [record("Q", "yes"), record("Q", " yes "), record("Q", "no", "Q", "yes"), record("Q", "no")]
    number, shares = answer_shares(checked(tmp_path, "data.train", rows))
    assert number == 2
    assert [(share.name, share.count, share.share) for share in shares] == [("yes", 3, 0.75), ("no", 1, 0.25)]


@pytest.mark.parametrize(
    "lengths", [[7], [5, 6, 7], [10, 10, 95], [1, 2, 3000, 100_000], list(range(60, 2048, 7)), [576] * 5 + [4000]]
)
def test_a_histogram_has_each_record_once_and_few_lines(lengths: list[int]) -> None:
    shares = length_shares(np.array(lengths, dtype=np.int32))
    assert sum(share.count for share in shares) == len(lengths) and len(shares) <= 10
    assert sum(share.share for share in shares) == pytest.approx(1.0)
    ends = [[int(end.replace(",", "")) for end in share.name.split(" to ")] for share in shares]
    assert ends[0][0] == min(lengths) and ends[-1][-1] == max(lengths)
    for (one, following), share in zip(zip(ends, [*ends[1:], [max(lengths) + 1]], strict=True), shares, strict=True):
        assert one[-1] == following[0] - 1
        assert share.count == sum(one[0] <= length <= one[-1] for length in lengths)


def test_of_each_kind_of_error_the_first_three_are_kept(tmp_path: Path) -> None:
    rows = [record("Q", "A"), *[{"id": str(n)} for n in range(5)], record("Q", ""), record("Q")]
    found = examples_of_errors(checked(tmp_path, "data.train", rows))
    assert {kind: (count, len(said)) for kind, (count, said) in found.items()} == {
        "fields": (5, 3), "blank_answer": (1, 1), "roles": (1, 1)
    }  # fmt: skip
    assert next(iter(found)) == "fields" and "row 2 (id '0')" in found["fields"][1][0]


def test_ids_repeat_within_a_file_among_records_that_can_be_used(tmp_path: Path) -> None:
    rows = [{"id": "x"}, *[record("Q", "A", id=id) for id in ("x", "y", "x", "x")], record("Q", "A"), record("Q", "B")]
    found = checked(tmp_path, "data.train", rows)
    assert found.repeated == {3: 1, 4: 1}
    error = str(repeated_id(found.corpus, 4, 1))
    assert "row 5 (id 'x'): row 2 has the same id. Give each record its own id" in error
