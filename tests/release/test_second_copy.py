"""A comparison runs where memory has room for a second copy, counted in the bits that it is loaded in."""

from pathlib import Path

import pytest
import torch

from llava_accel.recipe import QuantizationTable
from llava_accel.release import second_copy
from llava_accel.release.second_copy import copy_bytes, find_place

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SIXTEEN, FOUR = QuantizationTable(), QuantizationTable(bits=4)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that are free on a GPU and in main memory."""
    found = {"gpu": 1 << 40, "main": 1 << 40}
    monkeypatch.setattr(second_copy, "free_bytes", lambda _device: found["gpu"])
    monkeypatch.setattr(second_copy, "free_main_memory", lambda: found["main"])
    monkeypatch.setattr(second_copy, "SPARE_BYTES", 0)
    return found


def test_a_4_bit_copy_is_counted_as_4_bits(llava_folder: Path, tmp_path: Path) -> None:
    whole = copy_bytes(llava_folder, "", SIXTEEN, torch.bfloat16)
    assert whole == pytest.approx(copy_bytes(llava_folder, "", SIXTEEN, torch.float32) / 2)
    stored = (llava_folder / "model.safetensors").stat().st_size
    assert whole == pytest.approx(stored / 2, rel=0.1), "the file is in fp32"
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # of the language model
    saved = whole - copy_bytes(llava_folder, "", FOUR, torch.bfloat16)
    assert saved == pytest.approx(layers * (16 - 4.127) / 8, rel=0.01)
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(1000))
    assert copy_bytes(tmp_path, str(llava_folder), SIXTEEN, torch.bfloat16) == whole + 1000


def test_the_first_place_with_room_is_taken(llava_folder: Path, free: dict[str, int]) -> None:
    def place() -> tuple[str, torch.dtype] | None:
        found = find_place(llava_folder, "", SIXTEEN, torch.bfloat16, CUDA)
        return (found.device, found.dtype) if found else None

    in_16, in_32 = (copy_bytes(llava_folder, "", SIXTEEN, dtype) for dtype in (torch.bfloat16, torch.float32))
    free["gpu"] = in_16
    assert place() == ("cuda:0", torch.bfloat16)
    free["gpu"] -= 1
    assert place() == ("cpu", torch.float32)
    free["main"] = in_32 - 1
    assert place() == ("cpu", torch.bfloat16)
    free["main"] = in_16 - 1
    assert place() is None


def test_without_a_gpu_nobody_looks_for_its_memory(llava_folder: Path, free: dict[str, int]) -> None:
    found = find_place(llava_folder, "", SIXTEEN, torch.float32, CPU)
    assert found is not None and found.device == "cpu"
    free["main"] = 0
    assert find_place(llava_folder, "", SIXTEEN, torch.float32, CPU) is None


def test_what_it_takes_is_said(llava_folder: Path, free: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_copy, "_LARGE", 0)
    said = str(find_place(llava_folder, "", SIXTEEN, torch.float32, CPU))
    assert "on the CPU in float32: it takes 0.0 of 1,024.0 GiB that are free, and about" in said and said.endswith(" s")
