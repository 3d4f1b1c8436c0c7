"""Micro-batches come in the order that was asked for, the same from any number of workers, bad images named."""

import resource
from collections.abc import Iterator, Sequence
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.samples import IMAGE_ID, NUM_IMAGE_TOKENS, corpus, image_processor, record, write_images
from llava_accel.compat import end_of_worker
from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, load_windows, where, worker_start
from llava_accel.data.pixels import ImageReader
from llava_accel.data.row_forms import RowForm
from llava_accel.data.sampler import Order, Window, windows
from llava_accel.sources.problems import DataError


@pytest.fixture
def data(tmp_path: Path) -> Corpus:
    """Twelve records: every third of text alone, the others on five images."""
    write_images(tmp_path, *(f"{n}.png" for n in range(5)))
    records = [
        record("Q?", "A" * (n + 1), id=f"id {n}")
        if n % 3 == 0
        else record("<image>\nQ?", "A" * (n + 1), image=f"{n % 5}.png", id=f"id {n}")
        for n in range(12)
    ]
    return corpus(tmp_path, records)


def refuse(error: DataError) -> None:
    raise error


def load(data: Corpus, asked: Sequence[Window] | Iterator[Window], workers: int = 0, on_error=refuse):
    return load_windows(
        data,
        ImageReader(image_processor(), "pad"),
        asked,
        workers=workers,
        device=torch.device("cpu"),
        on_error=on_error,
    )


def rows(window: list[Loaded]) -> Window:
    return [batch["indices"].tolist() for batch in window]  # type: ignore[union-attr]


ASKED = [[[0, 1], [2]], [[3, 4, 5]], [[], [6]], [[7], [], [8, 1]]]


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_come_whole_and_in_order(data: Corpus, workers: int) -> None:
    assert [rows(window) for window in load(data, ASKED, workers)] == ASKED


def test_any_number_of_workers_gives_the_same_batches(data: Corpus) -> None:
    for one, two in zip(load(data, ASKED), load(data, ASKED, workers=2), strict=True):
        for batch, other in zip(one, two, strict=True):
            assert batch.keys() == other.keys()
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, other[name]) and value.dtype == other[name].dtype  # type: ignore
                else:
                    assert value == other[name]


def test_the_epochs_of_a_run_come_through_one_loader(data: Corpus) -> None:
    lengths = np.array([len(data.encode(row).example.input_ids) for row in range(12)])
    order = Order(lengths=lengths, seed=0, global_batch_size=5)
    steps = [step[0] for step in windows(order, 1, 9, per_device_batch_size=2, num_ranks=1)]
    found = [rows(window) for window in load(data, iter(steps), workers=2)]
    assert found == steps
    assert sorted(row for window in found[2:5] for batch in window for row in batch) == list(range(12))


def test_a_image_of_several_records_is_decoded_once_and_stands_in_each(data: Corpus) -> None:
    ((batch,),) = load(data, [[[1, 11, 2, 0]]])
    assert batch["pixel_values"].shape == (2, 3, 56, 56)  # type: ignore[union-attr]
    number = NUM_IMAGE_TOKENS
    assert (batch["image_index"] // number).tolist() == [0] * 2 * number + [1] * number  # type: ignore
    ids, places = batch["input_ids"], batch["image_positions"]
    assert isinstance(ids, torch.Tensor) and (ids.flatten()[places] == IMAGE_ID).all()


def test_an_empty_micro_batch_is_a_batch_without_targets(data: Corpus) -> None:
    ((batch,),) = load(data, [[[]]])
    assert batch["input_ids"].shape == (1, 1) and len(batch["target_ids"]) == 0  # type: ignore


@pytest.mark.parametrize("workers", [0, 2])
def test_a_image_that_breaks_after_the_survey_is_named_and_its_record_left_out(
    data: Corpus, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "1.png").write_bytes(b"")  # of rows 1 and 11
    (tmp_path / "2.png").unlink()  # of rows 2 and 7
    errors: list[DataError] = []
    found = [rows(window) for window in load(data, [[[0, 1], [2]], [[11, 4, 7]]], workers, errors.append)]
    assert found == [[[0], []], [[4]]]
    assert [(error.kind, error.row, error.id) for error in errors] == [
        ("broken_image", 2, "id 1"),
        ("missing_image", 3, "id 2"),
        ("broken_image", 12, "id 11"),
        ("missing_image", 8, "id 7"),
    ]
    assert {error.file for error in errors} == {str(tmp_path / "data.jsonl")}
    assert "1.png" in str(errors[0]) and "2.png" in str(errors[1])


def test_a_pair_whose_reference_is_not_known_takes_none_of_anothers(tmp_path: Path) -> None:
    rows = [{"question": "Q", "chosen": f"yes {n}", "rejected": "no"} for n in range(3)]
    pairs = corpus(tmp_path, rows, RowForm(pairs=True), answers="pairs")
    pairs.reference = np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]])
    errors: list[DataError] = []
    ((batch,),) = load(pairs, [[[0, 1, 2]]], on_error=errors.append)
    assert batch["reference"].tolist() == [1.0, 2.0, 3.0, 4.0]  # type: ignore[union-attr]
    assert batch["indices"].tolist() == [0, 2] and [error.row for error in errors] == [2]  # type: ignore[union-attr]


def test_an_error_that_is_not_taken_stops_the_loop_with_its_own_message(data: Corpus, tmp_path: Path) -> None:
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"row 2 \(id 'id 1'\): there is no image '1.png'"):
        list(load(data, [[[1]]], workers=2))


def test_a_window_is_known_by_the_ids_of_its_records(data: Corpus) -> None:
    ((first, second),) = load(data, [[[3, 1], [0]]])
    assert where([first, second], data) == ["id 3", "id 1", "id 0"]


def test_a_worker_without_shared_memory_ends_the_run_and_does_not_let_it_wait(
    data: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    assert len(list(load(data, [[[0]]]))) == 1
    with pytest.raises(RuntimeError) as caught:
        list(load(data, [[[0]]], workers=1))
    assert end_of_worker(caught.value) == "was unable to allocate shared memory"


class Late:
    """What a worker has sent by a socket that is gone when it is fetched, or what cannot be made of what it has sent."""

    def __init__(self, is_sent: bool) -> None:
        self.is_sent = is_sent

    def __reduce__(self) -> tuple[Any, ...]:
        sent: Any = resource_sharer.DupFd(0)
        sent._id = ("/nowhere/socket", 1)
        return (sent.detach, ()) if self.is_sent else (Path("/nowhere/file").read_text, ())


@pytest.mark.parametrize("is_sent", [True, False])
def test_a_worker_that_ends_while_its_tensors_are_on_the_way_is_an_error_of_its_end(
    data: Corpus, monkeypatch: pytest.MonkeyPatch, is_sent: bool
) -> None:
    monkeypatch.setattr("llava_accel.data.loader.in_shared_memory", lambda each: (each, Late(is_sent)))
    with pytest.raises(RuntimeError if is_sent else FileNotFoundError) as caught:
        list(load(data, [[[0]]], workers=1))
    assert end_of_worker(caught.value) == ("exited unexpectedly" if is_sent else None)


def test_workers_may_have_as_many_files_open_as_the_system_lets_them(data: Corpus) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        worker_start(0)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 200
        worker_start(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
