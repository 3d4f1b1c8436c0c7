"""The bench counts the user's tokens, by a formula that is checked by hand, and runs both trainers on one recipe."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.plain_trainer import compare
from helpers.runs import mixed_records, recipe, write_records
from llava_accel.bench import bench
from llava_accel.estimate.flops import Work, costs
from llava_accel.estimate.trace import build_meta
from llava_accel.model.processing import load_processing

pytestmark = pytest.mark.slow


def test_a_recipe_is_timed(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.json", mixed_records(9))
    found = bench(recipe(tmp_path, data, train={"per_device_batch_size": 4}), 2, 2)
    assert found.keys() == {"tokens_per_s", "examples_per_s", "mfu", "overhead", "peak_bytes"}
    assert all(found[name] > 0 for name in found if name != "overhead")


def test_both_trainers_run_and_are_compared(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.json", mixed_records(9))
    found = compare(recipe(tmp_path, data, train={"per_device_batch_size": 4}), 2, 2)
    assert found.keys() == {"ratio", "ratio_cold", "memory_ratio"}
    assert all(value > 0 for value in found.values())


def test_operations_are_those_of_the_formula(tmp_path: Path) -> None:
    table = recipe(tmp_path, model={"adapter": "", "train": "projector"})
    processing = load_processing(table.model, "pad")
    found = costs(build_meta(table, processing, torch.float32), processing)
    text, vision = processing.base.text, processing.base.vision
    width, inner = text.hidden_size, text.intermediate_size
    heads = text.num_key_value_heads / text.num_attention_heads
    attention, mlp = width * width * (2 + 2 * heads), 3 * width * inner
    assert found.token == 4 * (text.num_hidden_layers * (attention + mlp) - mlp)
    assert found.read == 4 * mlp
    assert found.pair == 12 * width * text.num_hidden_layers
    assert found.target == 4 * width * processing.num_rows
    assert found.projector == 6 * (vision.hidden_size * width + width * width) * processing.tiling.tile_tokens
    work = Work.of_examples(np.array([3, 5]), targets=2, tiles=1, encoded=0)
    by_target = 2 * (found.target + found.read)
    assert found.of(work) == 8 * found.token + 21 * found.pair + by_target + found.projector


def test_heads_may_be_wider_together_than_the_model(tmp_path: Path) -> None:
    """As Qwen3's are, whose config names the width of a head."""
    table = recipe(tmp_path, model={"adapter": "", "train": "projector"})
    processing = load_processing(table.model, "pad")
    text = processing.base.text
    text.head_dim = 2 * text.hidden_size // text.num_attention_heads
    found = costs(build_meta(table, processing, torch.float32), processing)
    assert found.pair == 12 * 2 * text.hidden_size * text.num_hidden_layers
