"""What a checkpoint takes: of the disk, and of main memory while it is written in the background."""

from llava_accel.checkpoint.background import WORTH_IT
from llava_accel.estimate.peak_memory import Weights, state_bytes, unit_of
from llava_accel.recipe import Recipe


def checkpoint_bytes(weights: Weights, recipe: Recipe) -> int:
    """Bytes of one checkpoint: trained weights in fp32, the optimizer's state, and all other weights if trained in full."""
    frozen = weights.frozen_bytes if recipe.model.train == "full" else 0
    return frozen + round(weights.trained * (4 + state_bytes(recipe)))


def checkpoint_line(weights: Weights, recipe: Recipe, ranks: int) -> str:
    """A line for the user on what a checkpoint takes.

    Args:
        ranks: All of the run. They share the writing of a model trained in full; one alone writes an adapter.
    """
    size, table = checkpoint_bytes(weights, recipe), recipe.checkpoint
    unit, name = unit_of(size)
    shown = f"a checkpoint takes {size / unit:,.1f} {name} of the disk"
    own = size / (ranks if recipe.model.train == "full" else 1)
    if table.background is False or (table.background == "auto" and own < WORTH_IT):
        return shown
    return (
        f"{shown}, and as much main memory, over all machines, for the copy that is written while the next steps run "
        "(checkpoint.background)"
    )
