"""Stored features come back bit by bit, whoever writes at the same time and whatever is killed when."""

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_accel.data.feature_store import FeatureStore, FeatureWriter, digest

SHAPE = (3, 5)
GIGA = 10**9


def name(number: int) -> bytes:
    return digest(str(number).encode())


def names(*numbers: int) -> Tensor:
    return torch.tensor([list(name(number)) for number in numbers], dtype=torch.uint8).reshape(-1, 16)


def record(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).to(dtype)


def write(
    store: FeatureStore, *numbers: int, max_bytes: int = GIGA, dtype: torch.dtype = torch.float32
) -> FeatureWriter:
    writer = FeatureWriter(store, max_bytes)
    writer.put(names(*numbers), torch.stack([record(number, dtype) for number in numbers]))
    writer.flush()
    return writer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_record_comes_back_as_it_was_computed(tmp_path: Path, dtype: torch.dtype) -> None:
    write(FeatureStore(tmp_path, "tower"), 1, 2, dtype=dtype)
    store = FeatureStore(tmp_path, "tower")
    assert len(store) == 2 and name(3) not in store
    for number in (1, 2):
        assert store[name(number)].dtype == dtype and torch.equal(store[name(number)], record(number, dtype))


def test_another_tower_has_no_part_in_it(tmp_path: Path) -> None:
    write(FeatureStore(tmp_path, "tower"), 1)
    assert name(1) not in FeatureStore(tmp_path, "other")


def test_a_reader_sees_what_is_written_after_it_was_opened_even_in_a_worker(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "tower")
    assert name(1) not in store
    write(FeatureStore(tmp_path, "tower"), 1)
    assert torch.equal(store[name(1)], record(1))
    assert torch.equal(pickle.loads(pickle.dumps(store))[name(1)], record(1))


def test_features_never_take_more_than_their_limit(tmp_path: Path) -> None:
    each = record(0).nbytes + 160
    writer = write(FeatureStore(tmp_path, "tower"), *range(10), max_bytes=4 * each)
    assert writer.is_full and len(FeatureStore(tmp_path, "tower")) == 4
    write(FeatureStore(tmp_path, "other"), *range(10), max_bytes=8 * each)
    assert 0 < len(FeatureStore(tmp_path, "other")) < 8, "towers share the limit"
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors")) <= 8 * each


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    write(FeatureStore(tmp_path, "tower"), 1, 2)
    write(FeatureStore(tmp_path, "tower"), 1, 2)
    assert len(list(tmp_path.glob("tower/*.safetensors"))) == 1


def _write_for_ever(folder: Path, first: int) -> None:
    store = FeatureStore(folder, "tower")
    for number in range(first, 10**6):
        write(store, *range(5 * number, 5 * number + 5))


def test_writers_at_the_same_time_that_are_killed_leave_only_whole_records(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_for_ever, args=(tmp_path, first)) for first in (0, 1, 100)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("tower/*.safetensors"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    for writer in writers:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    # What a killed writer leaves half written is no record, and the next writer takes it away.
    (tmp_path / "tower" / "half.tmp").write_bytes(b"half a file")
    store = FeatureStore(tmp_path, "tower")
    found = [number for number in range(5000) if name(number) in store]
    assert len(found) >= 20 * 5 * 0.3
    assert all(torch.equal(store[name(number)], record(number)) for number in found)
    write(store, 10**7)
    assert name(10**7) in store and not list(tmp_path.glob("tower/*.tmp"))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write(FeatureStore(tmp_path, "tower"), 1)
    (file,) = tmp_path.glob("tower/*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read.*Delete it"):
        FeatureStore(tmp_path, "tower")[name(1)]
