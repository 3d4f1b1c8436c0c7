"""Questions that share an image run it once, and the update of a set of questions stays what it was."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llava_accel.train as verb
from helpers.runs import distance, metrics, recipe, talk, trained, write_records
from llava_accel.data.labels import Example
from llava_accel.data.sampler import Order, windows
from llava_accel.data.tiling import ImageView
from llava_accel.data.trie import share_rows

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5


def _records() -> list[dict[str, object]]:
    """Questions on a few images, out of order: some alike up to the answer, some on two images, some on none."""
    questions = ["What is it?", "What is it called?", "How many are there?", "Is it red?"]
    found = [talk(f"{q}{p}", questions[q], f"answer {q} {p} and more", f"t{p}.png") for q in range(4) for p in range(3)]
    found += [talk(f"same{n}", questions[0], f"another answer {n}", "t1.png") for n in range(2)]
    found += [talk(f"two{n}", questions[n], f"both {n}", "t1.png", "t2.png") for n in range(2)]
    return found + [talk(f"none{n}", questions[n], f"nothing to see {n}") for n in range(2)]


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mistral_instruct"])
def test_the_update_of_a_set_of_questions_is_the_same(tmp_path: Path, template: str) -> None:
    records = _records()
    data = write_records(tmp_path / "data.json", records)
    runs = {}
    for share in (False, True):
        # Small windows hold other questions with the switch than without: the whole set is one step here.
        run = recipe(
            tmp_path / str(share),
            data,
            model={"template": template},
            data={"share_prefix": share},
            train={"per_device_batch_size": 10, "accumulation_steps": 2, "max_steps": 3},
        )
        verb.train(run)
        runs[share] = Path(run.run.output_dir)
    plain, shared = (metrics(runs[share]) for share in (False, True))
    assert [line["num_examples"] for line in shared] == [len(records)] * 3
    for one, other in zip(plain, shared, strict=True):
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=TOLERANCE)
        assert other["num_tokens"] == one["num_tokens"], "tokens are counted as the data has them"
    assert distance(trained(runs[True] / "export"), trained(runs[False] / "export")) < TOLERANCE


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    batch=st.integers(1, 12),
    epoch=st.integers(0, 2),
    grouped=st.booleans(),
)
def test_an_epoch_sees_each_question_once_and_cuts_groups_only_between_steps(
    sizes: list[int], batch: int, epoch: int, grouped: bool
) -> None:
    groups = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    lengths = np.random.default_rng(1).integers(5, 50, len(groups))
    order = Order(lengths=lengths, seed=0, global_batch_size=batch, groups=groups, group_by_length=grouped)
    batches = list(order.epoch(epoch))  # pyright: ignore
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(groups)))
    assert all(len(found) == batch for found in batches[:-1])
    for found in batches:
        changes = np.count_nonzero(np.diff(groups[found]))
        assert changes == len(set(groups[found])) - 1, "questions on an image stand side by side"


def test_resuming_keeps_the_order_of_groups() -> None:
    groups = np.arange(60) % 13
    order = Order(lengths=np.full(60, 9), seed=3, global_batch_size=8, groups=groups)
    whole = list(windows(order, 0, 20, per_device_batch_size=4, num_ranks=2))
    assert list(windows(order, 11, 20, per_device_batch_size=4, num_ranks=2)) == whole[11:]


def _question(number: int, length: int) -> Example:
    ids = np.concatenate([[1], np.full(16, 99), 100 * (number + 1) + np.arange(length)])
    is_target = np.arange(len(ids)) >= len(ids) - 2
    return Example(input_ids=ids, is_target=is_target, image_starts=(1,), images=(ImageView("a", 16),), index=number)


@pytest.mark.parametrize("longest", [27, 40, 64, 1000])
def test_a_row_that_is_too_long_is_cut_between_questions(longest: int) -> None:
    questions = [_question(number, 10) for number in range(9)]
    rows = share_rows(questions, longest)
    assert all(len(row) <= longest for row in rows)
    assert sorted(index for row in rows for index in row.indices) == list(range(9))
    assert sum(len(row.target_ids) for row in rows) == 18
    assert len(rows) == {27: 9, 40: 5, 64: 3, 1000: 1}[longest] or len(rows) <= 9
    assert all(len(row) == 17 + 10 * len(row.indices) for row in rows), "the image stands once a row"
