"""Safetensors files of whole tensors that several processes write together, each the pieces that it has.

A tensor lies in such a file row by row, so a contiguous piece of it has a place of its own there: it is written to that
place, nothing is gathered, and the file is an ordinary one in the end. Each piece is hashed as it is written.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save
from torch import Tensor

_CHUNK_BYTES = 64 << 20  # copied from a device at once, by each thread
_BLOCK_BYTES = 4 << 20  # hashed and written before the next one: it is still in the processor's cache then
_LENGTH_BYTES = 8  # in which a safetensors file says how long its header is
_SEVERAL_MACHINES_FLAG = getattr(os, "O_DSYNC", 0)


@dataclass(frozen=True, slots=True)
class Share:
    """The piece of a tensor that this process has."""

    dtype: torch.dtype
    shape: torch.Size
    """Shape of the whole tensor."""
    start: int
    """Where the piece begins in the whole tensor, flattened."""
    piece: Tensor
    """Flat; empty if this process has nothing of the tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.shape.numel() * self.dtype.itemsize


def divided(tensor: Tensor, rank: int = 0, ranks: int = 1) -> Share:
    """The share of one of several processes that all have the whole tensor; for a single process, all of it."""
    start, end = (tensor.numel() * number // ranks for number in (rank, rank + 1))
    return Share(tensor.dtype, tensor.shape, start, tensor.detach().flatten()[start:end])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes that this process writes."""

    file: str
    offset: int
    content: Tensor | bytes

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


Pieces = dict[str, list[tuple[int, int, str]]]
"""File -> (start, exclusive end, SHA-256) of the pieces that were written."""
Files = dict[str, dict[str, Share]]
"""File -> name -> tensor in it."""


def into_files(tensors: Mapping[str, Share], pattern: str, most_bytes: int) -> tuple[Files, dict[str, object] | None]:
    """Divide tensors among files as the hub does.

    Args:
        pattern: Pattern of the files' names, with "{suffix}".
        most_bytes: Limit on the bytes of a file, unless a single tensor has more.

    Returns:
        The files, and the content of `model.safetensors.index.json` for transformers, None if there is only one file.
    """
    shapes = {name: torch.empty(share.shape, dtype=share.dtype, device="meta") for name, share in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=most_bytes)
    files = {file: {name: tensors[name] for name in names} for file, names in split.filename_to_tensors.items()}
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None
    return files, index


def chunks(files: Files, *, with_headers: bool) -> Iterator[Chunk]:
    """The chunks that this process writes. All processes call it with the same files, names, types and shapes.

    Args:
        with_headers: Write the headers, too; true on one process only.
    """
    for file, tensors in files.items():
        header = _header(tensors)
        if with_headers:
            yield Chunk(file, 0, header)
        place = len(header)
        for share in _ordered(tensors).values():
            offset = place + share.start * share.dtype.itemsize
            for part in share.piece.split(_CHUNK_BYTES // share.dtype.itemsize) if len(share.piece) else ():
                yield Chunk(file, offset, part)
                offset += part.nbytes
            place += share.nbytes


def make_files(folder: Path, files: Files) -> None:
    """Make the files, empty and as long as they will be, for all processes to write to; OSError if they cannot be."""
    for file, tensors in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        with (folder / file).open("xb") as made:
            made.truncate(len(_header(tensors)) + sum(share.nbytes for share in tensors.values()))


def write(folder: Path, parts: Iterable[Chunk], threads: int, *, is_shared_by_machines: bool = False) -> Pieces:
    """Write chunks to their places, flush them to the disk, and return their hashes.

    Args:
        threads: Number of threads that hash and write side by side; both release the interpreter's lock.
        is_shared_by_machines: Other machines write to the same files. Their file system must then not be sent whole pages,
            in which others may have written.

    Raises:
        OSError: a file is not there, or the disk is full.
    """
    parts, pieces = list(parts), Pieces()
    flag = _SEVERAL_MACHINES_FLAG if is_shared_by_machines else 0
    handles: dict[str, int] = {}
    try:
        for file in {part.file: None for part in parts}:
            handles[file] = os.open(folder / file, os.O_WRONLY | flag)
        with ThreadPoolExecutor(threads) as pool:
            for part, digest in zip(parts, pool.map(lambda part: _write(handles[part.file], part), parts), strict=True):
                pieces.setdefault(part.file, []).append((part.offset, part.offset + part.nbytes, digest))
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)
    return pieces


def copied(part: Chunk) -> Chunk:
    """The chunk with a copy of its tensor in main memory, which later steps do not change."""
    if isinstance(part.content, bytes):
        return part
    return Chunk(part.file, part.offset, part.content.to("cpu", copy=True))


def _write(handle: int, part: Chunk) -> str:
    """Write a chunk and return its hash."""
    if isinstance(part.content, bytes):
        left = memoryview(part.content)
    else:
        left = memoryview(part.content.cpu().contiguous().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    offset, digest = part.offset, hashlib.sha256()
    while left:
        block, left = left[:_BLOCK_BYTES], left[_BLOCK_BYTES:]
        digest.update(block)
        while block:  # a disk that fills up takes a part of it first
            written = os.pwrite(handle, block, offset)
            block, offset = block[written:], offset + written
    return digest.hexdigest()


def _ordered(tensors: Mapping[str, Share]) -> dict[str, Share]:
    """Tensors in safetensors' order: wide types first, so that each begins at a multiple of its type's width."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _header(tensors: Mapping[str, Share]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, share in _ordered(tensors).items():
        span = [place, place + share.nbytes]
        entries[name] = {"dtype": _type_name(share.dtype), "shape": list(share.shape), "data_offsets": span}
        place = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


@cache
def _type_name(dtype: torch.dtype) -> str:
    """The name that safetensors gives a type."""
    content = save({"x": torch.empty(0, dtype=dtype)})
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    return json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length])["x"]["dtype"]
