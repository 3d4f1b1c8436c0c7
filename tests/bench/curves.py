"""How far the five curves of LLaVA-NeXT's own train() end from ours, in fp32 and without rounding.

    python tests/bench/curves.py

For each: the furthest loss of 20 steps, the furthest of the final numbers, and how many are more than 1e-4 away.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.curves import RUNS, WEIGHT_TOLERANCE, distances, records, reference, settings
from helpers.fp64 import IN_FP64, in_fp64
from helpers.runs import losses, recipe
from llava_accel.train import train


def main() -> None:
    """Print a line for each curve and type."""
    for name in RUNS:
        for precision in ("fp32", "fp64"):
            with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
                followed = settings(name)
                if precision == "fp64":
                    followed["data"] |= IN_FP64
                    in_fp64(patch)
                with contextlib.redirect_stdout(io.StringIO()):
                    train(recipe(Path(folder), records(name), **followed))
                patch.undo()
                run, theirs = Path(folder) / "run", [step["loss"] for step in reference(name)]
                loss = max(abs(one - other) for one, other in zip(losses(run), theirs, strict=True))
                apart = distances(run, name)
            away = int((apart > WEIGHT_TOLERANCE).sum())
            print(f"{name}, {precision}: loss {loss:.1e}, weights {apart.max():.1e}, {away} of {len(apart)} beyond")


if __name__ == "__main__":
    main()
