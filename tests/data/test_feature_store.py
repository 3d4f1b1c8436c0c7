"""Stored features come back bit by bit, whoever writes at the same time and whatever is killed when."""

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llava_accel.data import feature_store
from llava_accel.data.feature_store import FeatureStore, FeatureWriter, digest

SHAPE = (1, 3, 5)
GIGA = 10**9


def name(number: int) -> bytes:
    return digest(str(number).encode())


def names(*numbers: int) -> Tensor:
    """-1 stands for a further tile of the image before."""
    named = [list(name(number)) if number >= 0 else [0] * 16 for number in numbers]
    return torch.tensor(named, dtype=torch.uint8).reshape(-1, 16)


def present(store: FeatureStore, number: int) -> Tensor:
    found = store.get(name(number))
    assert found is not None
    return found


def record(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).to(dtype)


def write(
    store: FeatureStore, *numbers: int, max_bytes: int = GIGA, dtype: torch.dtype = torch.float32
) -> FeatureWriter:
    writer = FeatureWriter(store, max_bytes)
    writer.put(names(*numbers), torch.cat([record(number, dtype) for number in numbers]))
    writer.flush()
    return writer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_record_comes_back_as_it_was_computed(tmp_path: Path, dtype: torch.dtype) -> None:
    write(FeatureStore(tmp_path, "tower"), 1, 2, dtype=dtype)
    store = FeatureStore(tmp_path, "tower")
    assert len(store) == 2 and name(3) not in store
    for number in (1, 2):
        assert present(store, number).dtype == dtype and torch.equal(present(store, number), record(number, dtype))


def test_the_tiles_of_an_image_are_one_record(tmp_path: Path) -> None:
    writer = FeatureWriter(FeatureStore(tmp_path, "tower"), GIGA)
    writer.put(names(1, 2, -1, -1, 3), torch.cat([record(number) for number in range(5)]))
    writer.flush()
    store = FeatureStore(tmp_path, "tower")
    assert [len(present(store, number)) for number in (1, 2, 3)] == [1, 3, 1]
    assert torch.equal(present(store, 2), torch.cat([record(number) for number in (1, 2, 3)]))
    assert digest(b"1") != digest(b"1", is_cut=True)


def test_equal_images_side_by_side_are_one_record_of_one_of_them(tmp_path: Path) -> None:
    writer = FeatureWriter(FeatureStore(tmp_path, "tower"), GIGA)
    writer.put(names(1, 1, 2, -1, 2, -1), torch.cat([record(number) for number in (1, 1, 2, 3, 2, 3)]))
    writer.flush()
    store = FeatureStore(tmp_path, "tower")
    assert torch.equal(present(store, 1), record(1))
    assert torch.equal(present(store, 2), torch.cat([record(2), record(3)]))


def test_a_records_mean_is_kept_beside_it_and_made_of_it_where_it_is_not(tmp_path: Path) -> None:
    writer = FeatureWriter(FeatureStore(tmp_path, "tower"), GIGA)
    writer.put(names(1, -1), torch.cat([record(1, torch.bfloat16), record(2, torch.bfloat16)]))
    writer.flush()
    store = FeatureStore(tmp_path, "tower")
    expected = present(store, 1).float().mean((0, 1))
    assert torch.equal(mean(store, 1), expected) and len(store) == 1 and store.mean(name(2)) is None
    save_file({name(3).hex(): record(3)}, store.folder / "old.safetensors")  # of an earlier version
    assert torch.equal(mean(store, 3), record(3).mean((0, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            store, "get", lambda name, get=store.get: get(name) if len(name) > 16 else pytest.fail("read whole")
        )
        assert torch.equal(mean(store, 1), expected)


def mean(store: FeatureStore, number: int) -> Tensor:
    found = store.mean(name(number))
    assert found is not None
    return found


def test_a_store_without_records_is_one_and_asking_that_counts_none(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "tower")
    assert not len(store)
    store.folder.rmdir()  # whoever counts lists it
    (tmp_path / "tower").write_text("no folder")
    assert store


def test_another_tower_has_no_part_in_it(tmp_path: Path) -> None:
    write(FeatureStore(tmp_path, "tower"), 1)
    assert name(1) not in FeatureStore(tmp_path, "other")


def test_a_reader_sees_what_is_written_after_it_was_opened_even_in_a_worker(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "tower")
    assert name(1) not in store
    write(FeatureStore(tmp_path, "tower"), 1)
    assert torch.equal(present(store, 1), record(1))
    assert torch.equal(present(pickle.loads(pickle.dumps(store)), 1), record(1))


def test_features_never_take_more_than_their_limit(tmp_path: Path) -> None:
    each = record(0).nbytes + record(0)[0, 0].nbytes + 2 * 220
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
    (tmp_path / "tower" / f"{'0' * 32}.safetensors.{'1' * 32}.tmp").write_bytes(b"half a file")
    store = FeatureStore(tmp_path, "tower")
    found = [number for number in range(5000) if name(number) in store]
    assert len(found) >= 20 * 5 * 0.3
    assert all(torch.equal(present(store, number), record(number)) for number in found)
    write(store, 10**7)
    assert name(10**7) in store and not list(tmp_path.glob("tower/*.tmp"))


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def _cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip_a_bit, _cut_off, _empty])
def test_a_damaged_file_is_removed_and_its_records_are_computed_anew(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    write(FeatureStore(tmp_path, "tower"), 1, 2)
    (file,) = tmp_path.glob("tower/*.safetensors")
    write(FeatureStore(tmp_path, "tower"), 3)
    damage(file)
    store = FeatureStore(tmp_path, "tower")
    for number in (1, 2):
        store.get(name(number))
        store.mean(name(number))
    assert [store.get(name(number)) is None for number in (1, 2, 3)] == [True, True, False]
    assert not file.exists() and capsys.readouterr().err.count(file.name) == 1
    write(store, 1, 2)
    again = FeatureStore(tmp_path, "tower")
    assert all(torch.equal(present(again, number), record(number)) for number in (1, 2, 3))


def test_a_file_that_cannot_be_opened_now_may_be_whole_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(FeatureStore(tmp_path, "tower"), 1)

    def refusing(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(feature_store, "safe_open", refusing)
        assert FeatureStore(tmp_path, "tower").get(name(1)) is None
    assert "Too many open files" in capsys.readouterr().err
    assert torch.equal(present(FeatureStore(tmp_path, "tower"), 1), record(1))


def test_a_file_that_another_process_removed_is_no_error(tmp_path: Path) -> None:
    write(FeatureStore(tmp_path, "tower"), 1)
    store = FeatureStore(tmp_path, "tower")
    for file in tmp_path.glob("tower/*.safetensors"):
        file.unlink()
    assert store.get(name(1)) is None
    write(store, 1)
    assert torch.equal(present(store, 1), record(1))


def test_records_of_earlier_versions_have_no_checksum_and_are_read(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "tower")
    save_file({name(1).hex(): record(1)}, store.folder / f"{'a' * 32}.safetensors")
    assert torch.equal(present(store, 1), record(1))


def test_a_process_that_keeps_the_lock_ends_the_keeping_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = FeatureStore(tmp_path, "tower")
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    os.kill(holder.pid, signal.SIGSTOP)
    writer = FeatureWriter(store, GIGA)
    writer.put(names(1), record(1))
    since = time.monotonic()
    writer.flush(patience_s=0.3)
    assert time.monotonic() - since < 5 and writer.is_full and "lock" in writer.problem
    writer.put(names(2), record(2))
    writer.flush(patience_s=0.3)
    assert capsys.readouterr().err.count("no more are kept") == 1
    holder.kill()
    holder.communicate()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_or_lock_that_refuses_ends_the_keeping_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refusing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(
        feature_store.fcntl if code == errno.ENOLCK else os, "flock" if code == errno.ENOLCK else "replace", refusing
    )
    writer = write(FeatureStore(tmp_path, "tower"), 1)
    assert writer.is_full and writer.problem == os.strerror(code)
    assert not list(tmp_path.glob("tower/*"))
