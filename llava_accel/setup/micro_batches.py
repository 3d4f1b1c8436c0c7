"""Records as micro-batches on the run's device, in the layout that its recipe asks for."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from jaxtyping import Int

from llava_accel.data.loader import Loaded, load_windows
from llava_accel.data.questions import image_batches
from llava_accel.data.sampler import Window
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import Part, list_skipped
from llava_accel.setup.run_folder import SKIPPED
from llava_accel.sources.problems import DataError


def load(
    run: RunContext,
    part: Part,
    wanted: Iterable[Window],
    enter: Callable[[str], None] | None = None,
    is_asked: Callable[[], bool] | None = None,
    *,
    skips: bool = True,
) -> Iterator[list[Loaded]]:
    """The micro-batches of these windows.

    Args:
        enter, is_asked: See `load_windows`.
        skips: Leave out a record that has broken since the data was read through, where the recipe says so.

    Raises:
        DataError: a record that was in order when the data was read through is broken now, and is not left out.
    """
    recipe = run.recipe

    def list_it(error: DataError) -> None:
        list_skipped(Path(recipe.run.output_dir) / SKIPPED, [error])

    on_error = list_it if skips and recipe.data.on_bad_record == "skip" else None
    return load_windows(
        part.corpus,
        part.image_reader,
        wanted,
        workers=recipe.data.num_workers,
        device=run.accelerator.device,
        on_error=on_error,
        enter=enter,
        is_asked=is_asked,
        **row_layout(recipe),
    )


def row_layout(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `load_windows` that say how to lay records out in rows, as the recipe wants it."""
    share_up_to = recipe.data.max_length if recipe.data.share_prefix else 0
    return {"share_up_to": share_up_to, "pack": recipe.model.attention != "flash_attention_2"}


def own_batches(rows: Int[np.ndarray, "rows"], part: Part, size: int, accelerator: Accelerator) -> list[list[int]]:
    """This rank's batches of rows, see `image_batches`. All ranks get the same number: backends that gather weights need
    every rank every time."""
    batches = image_batches(rows, part.survey.lengths[rows], part.survey.image_keys[rows], size)
    batches += [[] for _ in range(-len(batches) % accelerator.num_processes)]
    return batches[accelerator.process_index :: accelerator.num_processes]
