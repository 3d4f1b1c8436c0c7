"""A tower's name is that of its numbers; it is read through once, and again when one of its files has changed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from helpers.runs import PARITY, recipe
from llava_accel.model.build import load_model
from llava_accel.model.objective import Objective
from llava_accel.model.processing import load_processing
from llava_accel.recipe import make_recipe
from llava_accel.setup.vision_cache import features_key, name_tower


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy that tests may change: the base and, beside it, the tower that its config names."""
    shutil.copytree(PARITY / "llava-orig", tmp_path / "base")
    shutil.copytree(PARITY / "clip", tmp_path / "clip")
    return tmp_path / "base"


def name(base: Path, *, loaded: bool = False, dtype: torch.dtype = torch.float32) -> str:
    recipe = make_recipe({"run": {"name": "t"}, "model": {"base": str(base)}, "data": {"train": "x.json"}})
    processing = load_processing(recipe.model, "pad")
    found = load_model(recipe, processing, dtype=dtype, device=torch.device("cpu"), leave_tower=not loaded)
    objective = Objective(found.model, found.vocab_size)
    objective.parked = found.tower
    return name_tower(objective, base.parent / "cache", Accelerator(cpu=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_on_disk_has_the_name_of_a_loaded_one(base: Path, dtype: torch.dtype) -> None:
    assert name(base, dtype=dtype) == name(base, loaded=True, dtype=dtype)


def test_a_second_start_reads_no_weight(base: Path, tower_reads: list[str]) -> None:
    first = name(base)
    assert tower_reads and len(tower_reads) == len(set(tower_reads))
    tower_reads.clear()
    assert name(base) == first and tower_reads == []


def test_the_same_numbers_in_another_file_have_the_same_name(base: Path, tower_reads: list[str]) -> None:
    first = name(base)
    tower_reads.clear()
    os.utime(base.parent / "clip" / "model.safetensors")
    assert name(base) == first and tower_reads, "a file that was written to is read again"


def test_other_numbers_of_the_same_size_and_time_have_another_name(base: Path) -> None:
    first, file = name(base), base.parent / "clip" / "model.safetensors"
    before = file.stat()
    tensors = load_file(file)
    tensors["vision_model.encoder.layers.0.mlp.fc1.weight"][-1, -1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    assert name(base) != first


def test_another_layer_or_type_has_another_name(base: Path) -> None:
    names = [name(base), name(base, dtype=torch.bfloat16)]
    config = base / "config.json"
    config.write_text(config.read_text().replace('"mm_vision_select_layer": -2', '"mm_vision_select_layer": -1'))
    names.append(name(base))
    assert len(set(names)) == 3


def test_features_of_turned_images_are_others(tmp_path: Path) -> None:
    keys = set()
    for exif in ("ignore", "apply"):
        settings = recipe(tmp_path, data={"exif": exif})
        processing = load_processing(settings.model, settings.data.image_aspect)
        keys |= {features_key("tower", processing, settings) for _ in range(2)}
    assert len(keys) == 2
