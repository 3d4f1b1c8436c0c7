"""The micro-batch that a rank must be able to hold, and the type that is computed in: what a plan starts from."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from numpy import ndarray

from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, load_windows, tensor
from llava_accel.data.pixels import ImageReader
from llava_accel.recipe import Recipe
from llava_accel.runtime.engines import resolve_precision
from llava_accel.sources.problems import DataError


def planned_dtype(precision: str, on_gpu: bool) -> torch.dtype:
    """That of the run on this machine; for a verdict on a GPU that is not here, what "auto" means on a GPU.

    Args:
        precision: The recipe's `run.precision`.
    """
    if on_gpu and precision == "auto" and not torch.cuda.is_available():
        return torch.bfloat16
    return resolve_precision(precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def load_largest(
    recipe: Recipe, corpus: Corpus, image_reader: ImageReader, candidates: Iterable[Int[ndarray, "rows"]]
) -> Loaded:
    """The largest of some micro-batches.

    Args:
        candidates: Rows of the corpus for each.

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
    return max((window[0] for window in windows), key=lambda batch: tensor(batch, "input_ids").numel())
