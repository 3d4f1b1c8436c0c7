"""The micro-batch that a rank must be able to hold, and the type that is computed in: what a plan starts from."""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Int
from numpy import ndarray

from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, load_windows, tensor
from llava_accel.data.pixels import ImageReader
from llava_accel.data.tiling import ImageLayout
from llava_accel.estimate.trace import Moment, highest, trace_layouts
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.devices import find_device
from llava_accel.runtime.engines import resolve_precision
from llava_accel.sources.problems import DataError


def planned_dtype(precision: str, on_gpu: bool) -> torch.dtype:
    """That of the run on this machine; for a verdict on a GPU that is not here, what "auto" means on a GPU.

    Args:
        precision: The recipe's `run.precision`.
    """
    device = find_device()
    if on_gpu and precision == "auto" and device.type == "cpu":
        return torch.bfloat16
    return resolve_precision(precision, device)


def num_tokens(batch: Loaded) -> int:
    """Places in its rows."""
    return tensor(batch, "input_ids").numel()


def image_layouts(batch: Loaded) -> Sequence[ImageLayout]:
    """Of its different images."""
    found = batch["image_layouts"]
    assert isinstance(found, Sequence)
    return found


def num_tiles(batch: Loaded) -> int:
    """Squares that the vision tower sees."""
    return sum(layout.num_tiles for layout in image_layouts(batch))


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
        measure: What is large.

    Raises:
        DataError: a record or an image cannot be read.
    """

    def on_error(error: DataError) -> None:
        raise error

    windows = load_windows(
        corpus,
        image_reader,
        [[rows.tolist()] for rows in candidates],
        workers=0,
        device=torch.device("cpu"),
        on_error=on_error,
        share_up_to=recipe.data.max_length if recipe.data.share_prefix else 0,
        pack=recipe.model.attention != "flash_attention_2",
    )
    return max((window[0] for window in windows), key=measure)


def trace_worst(
    recipe: Recipe, processing: Processing, batches: Sequence[Loaded], dtype: torch.dtype
) -> tuple[Loaded, dict[bool, tuple[Moment, ...]]]:
    """The micro-batch with the highest peak, and the moments of all that can be the peak, as `trace_layouts` gives them."""
    traced = [trace_layouts(recipe, processing, batch, dtype) for batch in batches]
    peaks = [max(moment.by_rows + moment.by_weights for moment in each[False]) for each in traced]
    together = {shares: highest(moment for each in traced for moment in each[shares]) for shares in (False, True)}
    return batches[peaks.index(max(peaks))], together
