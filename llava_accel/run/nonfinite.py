"""What happens when a loss or a gradient is not finite: no update, the samples named, and the recipe decides."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, where
from llava_accel.recipe import Recipe
from llava_accel.run.accumulation import count_targets
from llava_accel.run.state import TrainState


def allows_update(
    window: Sequence[Loaded],
    grad_norm: Tensor,
    corpus: Corpus,
    recipe: Recipe,
    state: TrainState,
    accelerator: Accelerator,
) -> bool:
    """Whether the step may update the weights.

    The norm of the gradient, which all ranks share, is not finite as soon as one loss or gradient on one rank is not.
    Reading it is the one point where a step waits for the device: the update must not run before it is known.

    Raises:
        ValueError: it is not finite, and the recipe says "stop" or its limit is used up. Names the samples. Or the
            window has no target, because every record of it was left out while it was loaded.
    """
    norm = float(grad_norm)
    if math.isfinite(norm):
        return True
    if not float(count_targets(window, accelerator)):
        raise ValueError(
            f"step {state.step + 1}: none of its records could be loaded, so there is nothing to learn from. "
            f"They are listed in {Path(recipe.run.output_dir) / 'skipped.txt'}. Mend or remove them"
        )
    ids = gather_object(where(window, corpus))
    state.num_nonfinite += 1
    path = Path(recipe.run.output_dir) / "nonfinite.jsonl"
    if accelerator.is_main_process:
        with path.open("a") as file:
            file.write(json.dumps({"step": state.step + 1, "grad_norm": str(norm), "ids": ids}) + "\n")
    train = recipe.train
    if train.on_nonfinite == "stop" or state.num_nonfinite > train.max_nonfinite:
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise ValueError(
            f"step {state.step + 1}: the loss or gradient is not finite ({norm}), so no update was made. Its samples: "
            f'{shown} (all in {path}). Look at them, lower optim.learning_rate, or set train.on_nonfinite = "skip"'
        )
    return False
