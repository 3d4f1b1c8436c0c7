"""Bytes sent in a step and its time, on two processes of each engine beside one: the base of 80 M weights, on a CPU.

    python tests/bench/ranks.py

LoRA of rank 8 and the projector, 4 questions a step, each on an image of its own whose features are cached.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.eighty_million import make_base, make_data
from bench.ranks_worker import compare_ranks
from llava_accel.recipe import make_recipe

LAUNCH = Path(__file__).parents[2] / "launch"
BATCH, STEPS, ROUNDS = 4, 2, 2


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = make_recipe(
            {
                "run": {"name": "ranks", "precision": "fp32"},
                "model": {"base": str(make_base(folder / "base")), "lora": {"rank": 8, "alpha": 16}},
                "data": {"train": str(make_data(folder / "data", "one", BATCH * STEPS)), "workers": 0},
                "train": {"per_device_batch_size": BATCH},
            }
        )
        profiles = [LAUNCH / f"{name}.yaml" for name in ("ddp", "zero2", "zero3", "fsdp2")]
        found = compare_ranks(recipe, profiles, processes=2, steps=STEPS, rounds=ROUNDS)
        for name, each in found.items():
            print(name, {kind: f"{count / 2**20:.2f} MiB" for kind, count in each["sent"].items()})


if __name__ == "__main__":
    main()
