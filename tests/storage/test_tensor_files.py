"""Files that several ranks write together are those that one would have written, and their hashes hold."""

import errno
import json
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from llava_accel.storage import tensor_files
from llava_accel.storage.atomic import MANIFEST, beside, commit, is_complete, known_pieces
from llava_accel.storage.tensor_files import (
    Files,
    Pieces,
    Share,
    chunks,
    copied,
    divided,
    into_files,
    make_files,
    write,
)

TENSORS = {
    "weight": torch.arange(35.0).reshape(7, 5),
    "half": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "mask": torch.tensor([True, False, True]),
    "step": torch.tensor(7.0),
    "codes": torch.arange(9, dtype=torch.uint8),
    "none": torch.empty(0, 4),
}


def by_rows(tensor: Tensor, rank: int, ranks: int) -> Share:
    """As FSDP2 divides: whole rows, the last rank may have none."""
    rows = tensor.chunk(ranks)[rank] if tensor.ndim and rank < len(tensor.chunk(ranks)) else tensor.flatten()[:0]
    start = rank * tensor.chunk(ranks)[0].numel() if tensor.ndim and len(rows) else 0
    if not tensor.ndim:
        return divided(tensor, rank, ranks)
    return Share(tensor.dtype, tensor.shape, start, rows.flatten())


def written(target: Path, of_ranks: Sequence[Files], threads: int = 2) -> Path:
    """The folder that ranks with these files have written."""
    unfinished, known = beside(target), Pieces()
    make_files(unfinished, of_ranks[0])
    for rank, files in enumerate(of_ranks):
        parts = list(chunks(files, with_headers=rank == 0))
        for file, pieces in write(unfinished, parts, threads, is_shared_by_machines=rank == 1).items():
            known.setdefault(file, []).extend(pieces)
    commit(unfinished, target, known=known)
    return target


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [divided, by_rows])
def test_what_ranks_write_together_is_what_safetensors_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, share: Callable[[Tensor, int, int], Share]
) -> None:
    monkeypatch.setattr(tensor_files, "_CHUNK_BYTES", 24)
    of_ranks = [{"x.safetensors": {n: share(t, rank, ranks) for n, t in TENSORS.items()}} for rank in range(ranks)]
    folder = written(tmp_path / "saved", of_ranks)
    found = load_file(folder / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(folder / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert is_complete(folder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    files = {"a/x.safetensors": {n: divided(t) for n, t in TENSORS.items()}}
    return written(tmp_path / "saved", [files])


def test_a_changed_bit_of_any_piece_is_found(saved: Path) -> None:
    file = saved / "a" / "x.safetensors"
    content = file.read_bytes()
    spans = json.loads((saved / MANIFEST).read_text())["a/x.safetensors"]
    assert len(spans) == 1 + len([tensor for tensor in TENSORS.values() if tensor.numel()])
    for span in spans:
        place = int(span.split("-")[1]) - 1
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_complete(saved)
    file.write_bytes(content)
    assert is_complete(saved)


@pytest.mark.parametrize("length", [-1, 1])
def test_a_file_of_another_length_is_found(saved: Path, length: int) -> None:
    file = saved / "a" / "x.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:length] if length < 0 else content + b"x")
    assert not is_complete(saved)


@pytest.mark.parametrize("spans", [{}, {"0-5": "x"}, {"3-5": "0" * 64}, {"0-3": "0" * 64, "4-5": "0" * 64}])
def test_a_manifest_with_a_gap_seals_nothing(saved: Path, spans: dict[str, str]) -> None:
    (saved / MANIFEST).write_text(json.dumps({"a/x.safetensors": spans}))
    assert not is_complete(saved)


def test_a_piece_that_no_rank_has_written_is_no_file(tmp_path: Path) -> None:
    one_of_two = {"x.safetensors": {n: divided(t, 0, 2) for n, t in TENSORS.items()}}
    with pytest.raises(AssertionError, match="gap"):
        written(tmp_path / "saved", [one_of_two])


def test_hashes_are_taken_over_for_a_copy(saved: Path) -> None:
    known = known_pieces(saved)
    assert list(known) == ["a/x.safetensors"] and known["a/x.safetensors"][0][0] == 0
    copy = beside(saved.parent / "copy")
    (copy / "a").mkdir()
    (copy / "a" / "x.safetensors").write_bytes((saved / "a" / "x.safetensors").read_bytes()[:-1] + b"!")
    with pytest.raises(OSError, match="does not give back"):
        commit(copy, saved.parent / "copy", known=known)


def test_a_copy_does_not_change_with_its_tensor() -> None:
    tensor = torch.zeros(4)
    (part,) = chunks({"x": {"t": divided(tensor)}}, with_headers=False)
    copy = copied(part)
    tensor.fill_(1.0)
    assert isinstance(copy.content, Tensor) and isinstance(part.content, Tensor)
    assert copy.content.sum() == 0 and part.content.sum() == 4
    (header,) = chunks({"x": {}}, with_headers=True)
    assert copied(header) == header


def test_many_tensors_become_several_files_with_an_index(tmp_path: Path) -> None:
    shares = {name: divided(tensor) for name, tensor in TENSORS.items()}
    files, index = into_files(shares, "model{suffix}.safetensors", 100)
    assert index is not None and len(files) > 1
    folder = written(tmp_path / "saved", [files])
    places = index["weight_map"]
    assert isinstance(places, dict) and places.keys() == TENSORS.keys()
    for name, file in places.items():
        assert torch.equal(load_file(folder / file)[name], TENSORS[name])
    (one,), none = into_files(shares, "model{suffix}.safetensors", 10_000)
    assert one == "model.safetensors" and none is None
    assert into_files({}, "optimizer{suffix}.safetensors", 100)[1] is None


@pytest.mark.parametrize("where", ["as it is made", "as it is written"])
def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, where: str) -> None:
    files = {"x.safetensors": {"t": divided(torch.zeros(100_000))}}
    if where == "as it is written":
        make_files(tmp_path, files)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            if where == "as it is made":
                make_files(tmp_path, files)
            write(tmp_path, list(chunks(files, with_headers=True)), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG


def test_a_rank_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "elsewhere", list(chunks({"x": {"t": divided(torch.ones(2))}}, with_headers=True)), 1)
