"""What a plan is made for: the batch of the longest records, and that of most tiles where a base shrinks their tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from helpers.runs import talk, write_records
from helpers.tiled import KIT
from llava_accel.console.output import Console
from llava_accel.estimate.trace import trace_step
from llava_accel.estimate.worst_case import num_tiles, num_tokens, trace_worst
from llava_accel.model.processing import Processing, load_processing
from llava_accel.plan import worst_batches
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import Part, open_data

SIZES = {"longest": (102, 125), "most_tiles": (222, 222), "small": (37, 37)}
"""Of images: the one of most tiles is shrunk to about as many tokens as nine tiles have, the longest just not."""


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Recipe, Processing, Part]:
    for name, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    records = [talk(number, "What?", "Red", f"{name}.png") for number, name in enumerate([*SIZES, *SIZES])]
    data = write_records(tmp_path / "data.json", records)
    tables = {
        "run": {"name": "r", "output_dir": str(tmp_path / "run")},
        "model": {"base": str(KIT / "onevision-qwen"), "template": "qwen_1_5", "train": "full", "train_vision": True},
        "data": {"train": str(data), "images": str(tmp_path), "cache_dir": str(tmp_path / "cache")},
        "train": {"per_device_batch_size": 2},
    }
    recipe = make_recipe(tables)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    part, _ = open_data(RunContext(recipe, Accelerator(cpu=True), Console(False)), processing)
    return recipe, processing, part


@pytest.mark.usefixtures("fresh_accelerator")
def test_the_batch_of_most_tiles_counts_beside_the_longest(opened: tuple[Recipe, Processing, Part]) -> None:
    recipe, processing, part = opened
    longest, most_tiled = worst_batches(recipe, part)
    assert num_tokens(longest) > num_tokens(most_tiled)
    assert num_tiles(most_tiled) == 37 > num_tiles(longest), "an image that two records show is seen once"
    worst, moments = trace_worst(recipe, processing, [longest, most_tiled], torch.float32)
    alone = [trace_step(recipe, processing, batch, torch.float32, False) for batch in (longest, most_tiled)]
    peaks = [max(moment.by_rows + moment.by_weights for moment in each) for each in alone]
    assert worst is most_tiled and peaks[1] > peaks[0]
    assert max(moment.by_rows + moment.by_weights for moment in moments[False]) == peaks[1]


@pytest.mark.usefixtures("fresh_accelerator")
def test_one_batch_is_traced_where_the_longest_has_most_tiles(opened: tuple[Recipe, Processing, Part]) -> None:
    recipe, _, part = opened
    (longest,) = worst_batches(recipe, replace(part, rows=part.rows[part.survey.num_tiles[part.rows] != 13]))
    assert num_tiles(longest) == 37
