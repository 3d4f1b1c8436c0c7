"""The data is read once before the first step, whatever is wrong is found then, and a second start reads nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.samples import NUM_IMAGE_TOKENS, corpus, corpus_of, record, write_images
from llava_accel.data import survey as survey_file
from llava_accel.data.corpus import Corpus
from llava_accel.data.row_forms import RowForm
from llava_accel.data.survey import COLUMNS, Survey, cached_survey, survey
from llava_accel.sources.problems import DataError

LONG_TEXT = "word " * 60


def mixed(folder: Path, **settings: Any) -> Corpus:
    """Good records between some of every kind of bad ones."""
    write_images(folder, "a.png", "b.png")
    (folder / "text.png").write_text("no image")
    records = [
        record("Q", "A", id="good text"),
        record("<image>\nQ", "A", "Q", "B", image="a.png", id="good image"),
        {"id": "bare"},
        record("<image>\nQ", "A", image="none.png", id="missing"),
        record("<image>\nQ", "A", image="text.png", id="broken"),
        record("<image>\nQ", "A", image="../x.png", id="unsafe"),
        record("Q", "A", image="a.png", id="no mark"),
        record("Q", id="no answer"),
        {"conversations": [], "id": "empty"},
        record("Q", "A", "Q", LONG_TEXT, id="long"),
        record("Q", "", id="no word"),
        record("Q", "A", id="short"),
    ]
    return corpus(folder, records, **settings)


GOOD = [0, 1, 11]


def read(data: Corpus, workers: int = 0, decode: bool = False) -> Survey:
    return survey(data, workers=workers, decode=decode)


def test_unusable_rows_have_length_zero_and_their_kind(tmp_path: Path) -> None:
    found = read(mixed(tmp_path, max_length=120))
    assert found.usable.tolist() == GOOD
    kinds = {row: error.kind for row, error in found.errors.items()}
    assert kinds == {
        2: "fields",
        3: "missing_image",
        4: "broken_image",
        5: "unsafe_path",
        6: "image_count",
        7: "roles",
        8: "empty",
        9: "too_long",
        10: "blank_answer",
    }
    assert found.errors_by_kind()["roles"] == 1 and found.errors_by_kind().total() == 9
    for row, error in found.errors.items():
        assert str(error).startswith(f"{tmp_path / 'data.jsonl'}, row {row + 1} (id '")
    for name in ("lengths", "num_targets", "num_images", "num_turns"):
        column = getattr(found, name)
        assert len(column) == 12 and not column[list(found.errors)].any()


def test_the_numbers_are_those_of_the_examples(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    found = read(data)
    for row in GOOD:
        example = data.encode(row).example
        assert found.lengths[row] == len(example.input_ids)
        assert found.num_targets[row] == example.num_targets
        assert found.num_images[row] == len(example.images)
    assert found.lengths[1] > NUM_IMAGE_TOKENS
    assert found.num_turns[GOOD].tolist() == [2, 4, 2]


def test_turns_are_those_of_user_and_assistant_that_were_kept(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "S"}, *record("Q", "A", "Q", "B", "Q", LONG_TEXT)["conversations"]]  # type: ignore
    data = corpus(tmp_path, [{"conversations": turns}], max_length=60, on_too_long="drop_turns")
    found = read(data)
    assert found.num_turns.tolist() == [4] and found.num_dropped_turns == 2


def test_a_dropped_turns_image_is_dropped_with_it(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    records = [record("<image>\nQ", "A", f"<image>\n{LONG_TEXT}", "B", image=["a.png", "b.png"])]
    data = corpus(tmp_path, records, max_length=120, on_too_long="drop_turns")
    ((name, *_),) = data.encode(0).example.images
    assert Path(name).name == "a.png" and read(data).num_images.tolist() == [1]


def test_one_round_that_is_too_long_is_never_cut(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    rows = [record("<image>\nQ", LONG_TEXT, "<image>\nQ", "A", image=["a.png", "b.png"])]
    (error,) = read(corpus(tmp_path, rows, max_length=100, on_too_long="drop_turns")).errors.values()
    assert error.kind == "too_long" and f", {NUM_IMAGE_TOKENS} of them of images, exceed data.max_length = 100" in str(
        error
    )
    assert error.remedy.endswith("set data.on_too_long to skip")


def test_a_image_that_breaks_off_is_found_only_by_decoding(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:6000])
    data = corpus(tmp_path, [record("<image>", "A", image="a.png", id="x")])
    assert read(data).usable.tolist() == [0]
    assert read(data, decode=True).errors_by_kind() == {"broken_image": 1}


def test_an_image_that_goes_while_all_are_read_is_an_error_of_its_record(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    data = corpus(tmp_path, [record("<image>", "A", image="a.png")])
    encode = data.encode

    def last(index: int):
        encoded = encode(index)
        (tmp_path / "a.png").unlink()
        return encoded

    data.encode = last  # type: ignore[method-assign]
    assert read(data).errors_by_kind() == {"missing_image": 1}


def same(one: Survey, other: Survey) -> None:
    for name in ("lengths", "num_targets", "num_images", "num_turns"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.num_dropped_turns == other.num_dropped_turns
    assert one.num_unpaired_turns == other.num_unpaired_turns
    assert {row: str(error) for row, error in one.errors.items()} == {
        row: str(error) for row, error in other.errors.items()
    }
    assert one.errors_by_kind() == other.errors_by_kind()


def test_workers_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_file, "_CHUNK", 32)
    monkeypatch.setattr(survey_file, "_SMALL", 64)
    write_images(tmp_path, "a.png")
    kinds = [record("Q", "A"), record("<image>\nQ", "long answer", image="a.png"), {"id": "x"}, record("Q")]
    data = corpus(tmp_path, [kinds[n % 4] for n in range(300)])
    steps: list[int] = []
    found = survey(data, workers=2, decode=False, progress=steps.append)
    same(found, read(data))
    assert sum(steps) == 300 and len(steps) > 1


def counting(data: Corpus) -> list[int]:
    """The rows of `data` that are read from now on."""
    rows: list[int] = []
    encode = data.encode

    def counted(index: int):
        rows.append(index)
        return encode(index)

    data.encode = counted  # type: ignore[method-assign]
    return rows


def test_a_second_start_reads_nothing_and_finds_the_same(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    rows = counting(data)
    first = cached_survey(data, "key", tmp_path / "cache", lambda: read(data))
    assert set(rows) == set(range(12))
    again = corpus_of(tmp_path / "data.jsonl")
    rows = counting(again)
    second = cached_survey(again, "key", tmp_path / "cache", lambda: pytest.fail("read again"))
    assert set(rows) == {3, 4, 5}, "only what is wrong with images can have changed"
    same(first, second)
    assert isinstance(second.errors[2], DataError) and second.errors[2].id == "bare"


def test_another_key_or_another_file_is_read_anew(tmp_path: Path) -> None:
    data = corpus(tmp_path, [record("Q", "A")])
    cached_survey(data, "key", tmp_path / "cache", lambda: read(data))
    rows = counting(data)
    cached_survey(data, "other", tmp_path / "cache", lambda: read(data))
    assert rows == [0]
    (tmp_path / "data.jsonl").write_text("\n" + (tmp_path / "data.jsonl").read_text())
    changed = corpus_of(tmp_path / "data.jsonl")
    rows = counting(changed)
    cached_survey(changed, "key", tmp_path / "cache", lambda: read(changed))
    assert rows == [0]


def test_rows_that_are_read_otherwise_are_read_anew(tmp_path: Path) -> None:
    data = corpus(tmp_path, [{"q": "Q", "p": "a longer question", "answer": "A"}], RowForm((("question", "q"),)))
    first = cached_survey(data, "key", tmp_path / "cache", lambda: read(data))
    other = corpus_of(tmp_path / "data.jsonl", RowForm((("question", "p"),)))
    second = cached_survey(other, "key", tmp_path / "cache", lambda: read(other))
    assert second.lengths[0] > first.lengths[0]


def test_turns_without_a_partner_are_counted_and_kept(tmp_path: Path) -> None:
    turns: list[object] = record("Q", "A", "Q")["conversations"]  # type: ignore
    leading = {"conversations": [{"from": "gpt", "value": "hello"}, *turns]}
    data = corpus(tmp_path, [{"conversations": turns}, leading, record("Q", "A"), record("Q", "", "Q")])
    found = cached_survey(data, "key", tmp_path / "cache", lambda: read(data))
    assert found.num_unpaired_turns == 3 and found.num_turns.tolist() == [2, 2, 2, 0]
    same(found, cached_survey(data, "key", tmp_path / "cache", lambda: pytest.fail("read again")))


def test_a_image_that_was_added_or_mended_is_found_by_the_next_start(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    cached_survey(data, "key", tmp_path / "cache", lambda: read(data))
    write_images(tmp_path, "none.png", "text.png")
    found = cached_survey(data, "key", tmp_path / "cache", lambda: pytest.fail("read again"))
    assert set(found.usable) == {*GOOD, 3, 4, 9}
    same(found, read(data))


def test_a_survey_that_was_cut_short_leaves_no_cache(tmp_path: Path) -> None:
    data = corpus(tmp_path, [record("Q", "A")])

    def stopped() -> Survey:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_survey(data, "key", tmp_path / "cache", stopped)
    assert len(cached_survey(data, "key", tmp_path / "cache", lambda: read(data)).usable) == 1


def test_a_image_of_many_questions_is_decoded_once_and_a_broken_one_is_told_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.png")
    (tmp_path / "bad.png").write_text("no image")
    names = ["a.png", "bad.png", "a.png", "bad.png", "a.png"]
    data = corpus(tmp_path, [record("<image>\nQ", "A", image=name, id=f"{n}") for n, name in enumerate(names)])
    opened: list[str] = []
    decode = Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, **settings: (opened.append(Path(path).name), decode(path, **settings))[1]
    )
    steps: list[int] = []
    found = survey(data, workers=0, decode=True, progress=steps.append)
    assert sorted(opened) == ["a.png", "bad.png"] and sum(steps) == 5
    assert found.usable.tolist() == [0, 2, 4]
    assert [(row, error.row, error.id) for row, error in found.errors.items()] == [(1, 2, "1"), (3, 4, "3")]


def test_a_kept_survey_is_mapped_and_takes_few_bytes_a_record(tmp_path: Path) -> None:
    data = corpus(tmp_path, [record("Q", "A" * (n + 1)) for n in range(5)])
    found = cached_survey(data, "key", tmp_path / "cache", lambda: read(data))
    columns = [getattr(found, name) for name in COLUMNS]
    assert sum(column.itemsize for column in columns) <= 60
    assert not any(column.flags.owndata or column.flags.writeable for column in columns)
