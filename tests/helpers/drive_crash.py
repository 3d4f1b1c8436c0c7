"""Trains a recipe and dies at the start of a step, as a killed process does: `python drive_crash.py RECIPE STEP`."""

import os
import sys

import llava_accel.train as verb
from llava_accel.loop import step as step_file
from llava_accel.recipe import load_recipe
from llava_accel.setup.state import seed_step

EXIT_CODE = 9


def main() -> None:
    """Die without a word to anyone as soon as STEP steps have been taken."""
    last = int(sys.argv[2])

    def dying(seed: int, step: int, rank: int) -> None:
        if step == last:
            os._exit(EXIT_CODE)
        seed_step(seed, step, rank)

    step_file.seed_step = dying
    verb.train(load_recipe(sys.argv[1]))


if __name__ == "__main__":
    main()
