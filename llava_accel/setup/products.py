"""Chooses how a run computes matrix products: before the first one, the same on all ranks, and kept when it resumes."""

from pathlib import Path

import torch

from llava_accel.kernels.matmul import LEAST_WIDTH, MOST_ERROR, Matmul, onednn_error, use_matmul
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import resolve_precision
from llava_accel.storage.run_weights import read_progress


def choose_matmul(run: RunContext, width: int, source: Path | None = None) -> None:
    """Let this process compute fp32 products through oneDNN where that is exact and faster, else as PyTorch would.

    A resumed run keeps the products that it began with. Where it cannot, as on another CPU, it says so and goes on: its
    numbers then agree to fp32's rounding, as with another number of threads. Every rank must call this.

    Args:
        width: Hidden size of the language model.
        source: The checkpoint that the run goes on from.
    """
    recipe, accelerator, console = run.recipe, run.accelerator, run.console
    if accelerator.device.type != "cpu":
        return
    is_fp32 = resolve_precision(recipe.run.precision, accelerator.device) == torch.float32
    before: Matmul | None = read_progress(source).get("matmul", "native") if source else None
    is_wanted = recipe.run.matmul == "auto" and is_fp32 and before != "native" and width >= LEAST_WIDTH
    error = onednn_error() if is_wanted else float("inf")
    errors = torch.as_tensor(accelerator.gather(torch.tensor([error], dtype=torch.float64)))
    is_exact = bool((errors < MOST_ERROR).all())
    use_matmul("onednn" if is_exact else "native")
    if is_exact:
        console.line(
            f"matrix products: oneDNN's in fp32, which a probe found exact here (relative error {error:.1e}); "
            'run.matmul = "native" turns them off'
        )
    elif before == "onednn":
        here = "PyTorch has none for this CPU" if errors.isinf().any() else "oneDNN's round on this CPU"
        reason = 'run.matmul = "native" says' if recipe.run.matmul == "native" else here
        console.line(
            f"matrix products: the run began with oneDNN's and goes on with PyTorch's own, as {reason}: its numbers agree "
            "to fp32's rounding, not bit for bit"
        )
