"""What a plan starts from: the micro-batch that a rank must be able to hold, and the type that is computed in."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, load_windows, tensor
from llava_accel.data.pixels import ImageReader
from llava_accel.data.sampler import deal
from llava_accel.data.tiling import ImageLayout
from llava_accel.estimate.trace import Moment, by_sharing, highest, trace_step
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.devices import find_device
from llava_accel.runtime.engines import resolve_precision
from llava_accel.setup.datasets import Part, build_order
from llava_accel.setup.micro_batches import row_layout

_CANDIDATES = 8


def planned_dtype(precision: str, on_gpu: bool) -> torch.dtype:
    """The type that a run computes in on this machine; for a GPU that is not here, what "auto" means on a GPU."""
    device = find_device()
    if on_gpu and precision == "auto" and device.type == "cpu":
        return torch.bfloat16
    return resolve_precision(precision, device)


def num_tokens(batch: Loaded) -> int:
    """Positions in a batch's rows, padding included."""
    return tensor(batch, "input_ids").numel()


def image_layouts(batch: Loaded) -> Sequence[ImageLayout]:
    """Layouts of a batch's distinct images."""
    layouts = batch["image_layouts"]
    assert isinstance(layouts, Sequence)
    return layouts


def num_tiles(batch: Loaded) -> int:
    """Tiles of a batch, those with stored features included."""
    return sum(layout.num_tiles for layout in image_layouts(batch))


def worst_batches(recipe: Recipe, part: Part) -> list[Loaded]:
    """What a rank must be able to hold: the largest micro-batch, and the one with most tiles if that has more tiles.

    An image of many tiles may have fewer tokens than another, as LLaVA-OneVision shrinks their map.
    """
    longest = worst_batch(recipe, part)
    most_tiled = worst_batch(recipe, part, by_tiles=True)
    return [longest, most_tiled] if num_tiles(most_tiled) > num_tiles(longest) else [longest]


def worst_batch(recipe: Recipe, part: Part, by_tiles: bool = False) -> Loaded:
    """The largest micro-batch, by tokens or by tiles.

    It is that of the largest records. But if records share prefixes, those on one image come together: then it is the
    largest among the micro-batches of the first epoch whose records have most tokens or tiles.
    """
    size, survey = recipe.train.per_device_batch_size, part.survey
    sizes = survey.num_tiles if by_tiles else survey.lengths
    longest = part.rows[np.lexsort((-survey.lengths[part.rows], -sizes[part.rows]))]
    candidates = [longest[:size]]
    if recipe.data.share_prefix:
        order = build_order(recipe, part, 1)
        dealt = [
            part.rows[np.array(micro_batch)]
            for batch in order.epoch(0)
            for micro_batch in deal(batch, order.sort_lengths, per_device_batch_size=size, num_ranks=1)[0]
        ]
        candidates = sorted(dealt, key=lambda rows: -int(sizes[rows].sum()))[:_CANDIDATES]
    return load_largest(recipe, part.corpus, part.image_reader, candidates, num_tiles if by_tiles else num_tokens)


def load_largest(
    recipe: Recipe,
    corpus: Corpus,
    image_reader: ImageReader,
    candidates: Iterable[Int[ndarray, "rows"]],
    measure: Callable[[Loaded], int] = num_tokens,
) -> Loaded:
    """The largest of some micro-batches.

    Args:
        candidates: Rows of the corpus for each.
        measure: The size of a micro-batch.

    Raises:
        DataError: a record or an image cannot be read.
    """
    wanted = [[rows.tolist()] for rows in candidates]
    windows = load_windows(corpus, image_reader, wanted, workers=0, device=torch.device("cpu"), **row_layout(recipe))
    return max((window[0] for window in windows), key=measure)


def trace_worst(
    recipe: Recipe, processing: Processing, batches: Sequence[Loaded], dtype: torch.dtype
) -> tuple[Loaded, dict[bool, tuple[Moment, ...]]]:
    """The micro-batch with the highest peak, and the moments of all that can be the peak, see `by_sharing`."""
    traced = [
        by_sharing(len(tensor(batch, "target_ids")), processing, partial(trace_step, recipe, processing, batch, dtype))
        for batch in batches
    ]
    peaks = [max(moment.by_rows + moment.by_weights for moment in each[False]) for each in traced]
    together = {shares: highest(moment for each in traced for moment in each[shares]) for shares in (False, True)}
    return batches[peaks.index(max(peaks))], together
