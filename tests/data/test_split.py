"""The held-out share is chosen by image, and depends on nothing but the image's name and the seed."""

import time
from pathlib import Path

import numpy as np
import pytest

from helpers.samples import corpus, encoder, record, write_lines
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.split import _Groups, held_out
from llava_accel.sources.named import Named


def on(*images: str, id: str = "x") -> dict[str, object]:
    return record("<image>" * len(images) + "Q", "A", image=list(images), id=id)


def split(data: Corpus, fraction: float, seed: int = 0) -> tuple[set[int], set[int]]:
    cache = data.sources[0].table.path.parent / "splits"
    train, evaluation = held_out(data, np.arange(len(data)), fraction, seed, cache)
    assert not set(train) & set(evaluation) and len(train) + len(evaluation) == len(data)
    assert (np.diff(train) > 0).all() and (np.diff(evaluation) > 0).all(), "the order of the data is kept"
    return set(train.tolist()), set(evaluation.tolist())


def test_no_image_is_on_both_sides(tmp_path: Path) -> None:
    data = corpus(tmp_path, [on(f"{n % 40}.png") for n in range(400)])
    train, evaluation = split(data, 0.3)
    assert not {n % 40 for n in train} & {n % 40 for n in evaluation}
    assert 0.1 < len(evaluation) / 400 < 0.5


def test_records_that_share_images_over_several_steps_stay_together(tmp_path: Path) -> None:
    chains = [[on(f"{c}-{n}.png", f"{c}-{n + 1}.png") for n in range(5)] for c in range(40)]
    data = corpus(tmp_path, [chain[n] for n in (4, 0, 2, 3, 1) for chain in chains])
    train, evaluation = split(data, 0.4)
    assert not {n % 40 for n in train} & {n % 40 for n in evaluation}


def test_a_file_is_one_image_however_it_is_spelled(tmp_path: Path) -> None:
    records = [on(name.format(n)) for n in range(40) for name in ("{}.png", "./{}.png", "sub/../{}.png")]
    train, evaluation = split(corpus(tmp_path, records), 0.4)
    assert not {n // 3 for n in train} & {n // 3 for n in evaluation}


def test_a_file_is_one_image_in_sources_with_other_folders(tmp_path: Path) -> None:
    (tmp_path / "all" / "sub").mkdir(parents=True)
    outer = write_lines(tmp_path / "outer.jsonl", [on(f"sub/{n}.png") for n in range(40)])
    inner = write_lines(tmp_path / "inner.jsonl", [on(f"{n}.png") for n in range(40)])
    entries = [Named(str(outer), str(tmp_path / "all")), Named(str(inner), str(tmp_path / "all" / "sub"))]
    train, evaluation = split(Corpus(open_sources(entries, tmp_path / "cache"), encoder()), 0.4)
    assert not {n % 40 for n in train} & {n % 40 for n in evaluation}


def test_a_record_keeps_its_side_when_others_are_added(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    few = [on(f"{n}.png") for n in range(50)]
    _, before = split(corpus(tmp_path / "a", few), 0.3)
    _, after = split(corpus(tmp_path / "b", few + [on(f"new{n}.png") for n in range(50)]), 0.3)
    assert {n for n in after if n < 50} == before


def test_another_seed_is_another_split_and_the_same_seed_the_same(tmp_path: Path) -> None:
    data = corpus(tmp_path, [on(f"{n}.png") for n in range(100)])
    assert split(data, 0.3, seed=1) == split(data, 0.3, seed=1) != split(data, 0.3, seed=2)


def test_a_text_only_record_goes_by_its_id(tmp_path: Path) -> None:
    data = corpus(tmp_path, [record("Q", "A", id=f"{n % 50}") for n in range(100)])
    train, evaluation = split(data, 0.3)
    assert not {n % 50 for n in train} & {n % 50 for n in evaluation}
    assert 0.1 < len(evaluation) / 100 < 0.5


def test_only_the_given_rows_are_split(tmp_path: Path) -> None:
    data = corpus(tmp_path, [on(f"{n}.png") for n in range(60)])
    rows = np.arange(0, 60, 2)
    train, evaluation = held_out(data, rows, 0.4, 0, tmp_path)
    assert sorted([*train, *evaluation]) == rows.tolist()


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_an_empty_side_is_refused(tmp_path: Path, fraction: float) -> None:
    data = corpus(tmp_path, [on(f"{n}.png") for n in range(10)])
    with pytest.raises(ValueError, match=r"data\.eval_fraction.*leaves (0|10) records.*data\.eval"):
        split(data, fraction)


def test_long_chains_of_shared_images_take_no_long_walk() -> None:
    groups = _Groups()
    names = [f"{n:06d}" for n in range(20_000)]
    for earlier, later in zip(names[-2::-1], names[:0:-1], strict=True):
        groups.join(earlier, later)
    started = time.process_time()
    assert {groups.find(name) for name in names} == {"000000"}
    assert time.process_time() - started < 5, "the way to the root was walked again and again"


def test_a_kept_split_is_the_same_and_reads_no_record(tmp_path: Path) -> None:
    data = corpus(tmp_path, [on(*(f"{n}.png", f"{n + 1}.png")[: 1 + n % 2]) for n in range(60)])
    rows = np.arange(60)
    first = held_out(data, rows, 0.3, 0, tmp_path / "cache")
    data.record = lambda index: pytest.fail("read again")  # type: ignore[method-assign]
    for one, other in zip(held_out(data, rows, 0.3, 0, tmp_path / "cache"), first, strict=True):
        assert np.array_equal(one, other)
