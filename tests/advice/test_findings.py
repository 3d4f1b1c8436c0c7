"""What is said of data before a recipe is there: what kind they are of, and whether they can be used at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.runs import PARITY, talk, write_records
from llava_accel.advice import findings as findings_file
from llava_accel.advice.findings import Findings, guess_task, look, measure, names_of_images, of_init
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import find_images
from llava_accel.sources.named import Named
from llava_accel.sources.problems import DataError

LONG = "a red square stands on the left of two blue circles"


def corpus(folder: Path, records: list[dict[str, object]], images: Path = PARITY / "images") -> Corpus:
    path = write_records(folder / "data.json", records)
    return Corpus(open_sources([Named(str(path), str(images))], folder / "cache"), find_images)


def found(folder: Path, records: list[dict[str, object]]) -> Findings:
    return look(corpus(folder, records))


def questions(count: int, answer: str = "red", asked: int = 1000, **more: Any) -> list[dict[str, object]]:
    """Records on two images, with so many different questions."""
    return [talk(n, f"What is {n % asked}?", answer, f"t{n % 2}.png") | more for n in range(count)]


@pytest.mark.parametrize(
    ("records", "task", "says"),
    [
        (questions(60), "vqa", "short answers to 60 different questions"),
        (questions(60, asked=1), "classify", "1 different short answer to 1 question"),
        (questions(60, LONG, asked=2), "caption", "about 11 words to 2 wordings"),
        (questions(60, LONG), "chat", "about 11 words to 60 different questions"),
        (questions(60, LONG, answers={LONG: 3}), "vqa", "answers of annotators"),
        (questions(60, "A", choices=["red", "blue"]), "vqa", "choices"),
    ],
)
def test_the_task_is_guessed_from_answers_and_questions(
    tmp_path: Path, records: list[dict[str, object]], task: str, says: str
) -> None:
    guessed, why = guess_task(found(tmp_path, records))
    assert guessed == task and says in why


def test_records_of_several_rounds_are_chats(tmp_path: Path) -> None:
    turns = [{"from": who, "value": "yes"} for who in ("human", "gpt") * 3]
    guessed, why = guess_task(found(tmp_path, [{"id": "1", "conversations": turns}]))
    assert (guessed, why) == ("chat", "a record has 3.0 questions on average")


def test_images_are_counted_once_and_apart_by_folder(tmp_path: Path) -> None:
    records = [*questions(8), talk("text", "Hello?", "yes")]
    one = found(tmp_path, records)
    assert (one.num_images, one.num_sets, one.num_groups, one.per_image) == (2, 2, 3, 4.0)
    other = tmp_path / "other"
    other.mkdir()
    both = Corpus(
        [source for folder in (PARITY / "images", other)
         for source in open_sources([Named(str(tmp_path / "data.json"), str(folder))], tmp_path / "cache")],
        find_images,
    )  # fmt: skip
    assert look(both).num_images == 4


def test_a_record_that_cannot_be_read_is_kept_apart(tmp_path: Path) -> None:
    seen = found(tmp_path, [*questions(3), {"id": "x"}])
    assert seen.rows.tolist() == [0, 1, 2] and [error.kind for error in seen.errors] == ["fields"]
    with pytest.raises(DataError, match=r"id 'x'.*None of the 1 records that were read can be used"):
        found(tmp_path, [{"id": "x"}])


def test_of_very_many_rows_blocks_over_all_of_them_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_file, "_MOST_ROWS", 20)
    monkeypatch.setattr(findings_file, "_BLOCK", 10)
    seen = found(tmp_path, questions(100))
    assert seen.rows.tolist() == [*range(10), *range(90, 100)]
    assert (seen.num_records, seen.num_read) == (100, 20)


def test_the_longest_rows_are_among_those_that_are_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_file, "_LONGEST", 2)
    monkeypatch.setattr(findings_file, "_SPREAD", 3)
    records = questions(50)
    records[7] = talk(7, "Say much.", "x" * 4000)
    records[8] = talk(8, "Say nothing.", "red", "t0.png", "t1.png")
    seen = corpus(tmp_path, records)
    assert measure(seen, look(seen)).rows.tolist() == [0, 7, 8, 24, 49]


def test_data_without_their_images_are_refused(tmp_path: Path) -> None:
    seen = corpus(tmp_path, questions(4), tmp_path)
    with pytest.raises(DataError, match="4 of 4 records that were looked at cannot be used") as caught:
        measure(seen, look(seen))
    assert "Add it, or give its folder with --images DIR" in str(of_init(caught.value))


def test_one_missing_image_is_no_reason_to_refuse(tmp_path: Path) -> None:
    seen = corpus(tmp_path, [*questions(4), talk("x", "What?", "red", "gone.png")])
    lengths = measure(seen, look(seen))
    assert [error.kind for error in lengths.errors] == ["missing_image"] and len(lengths.rows) == 4


def test_an_image_that_is_none_is_seen_by_its_header(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    seen = corpus(tmp_path, [talk(n, "What?", "red", f"{n}.png") for n in ("good", "good", "good", "bad")], tmp_path)
    assert [error.kind for error in measure(seen, look(seen)).errors] == ["broken_image"]


def test_names_of_images_leave_out_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(talk(1, "What?", "red", "a.png")), "{", json.dumps(talk(2, "What?", "red", "b.png", "c.png"))]
    path.write_text("\n".join(lines))
    sources = open_sources([Named(str(path))], tmp_path / "cache")
    assert [*names_of_images(Corpus(sources, find_images))] == ["a.png", "b.png", "c.png"]


def test_the_last_answer_is_the_last_stretch_of_targets() -> None:
    runs = np.array([False, True, True, False, True, True, True, False])
    assert findings_file._last_run(runs) == 3
    assert findings_file._last_run(runs[:4]) == 2
