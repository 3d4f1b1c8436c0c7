"""Peak of tensors with prompts as long as those of images in many tiles, on a model that is almost nothing itself.

python tests/bench/long_prompts.py eval|train QUESTIONS QUESTIONS_A_ROW [--tokens 8765]
"""

import argparse
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.toys import PX, VOCABULARY, make_llava
from llava_accel import compat
from llava_accel.data.collate import collate
from llava_accel.data.labels import Example
from llava_accel.data.questions import ask
from llava_accel.data.records import Record
from llava_accel.data.trie import build_row
from llava_accel.inference.answering import answer_batch
from llava_accel.model.objective import Objective

OWN, ANSWER = 39, 5  # tokens of a question, its answer among them
LOWEST, HIGHEST = 3, 90  # ids


def example(number: int, in_a_row: int, num_tokens: int) -> Example:
    """A question behind the prefix of its row."""
    shared = np.random.default_rng(number // in_a_row).integers(LOWEST, HIGHEST, size=num_tokens - OWN - 1)
    own = np.random.default_rng((number, 1)).integers(LOWEST, HIGHEST, size=OWN)
    ids = np.concatenate([[1], shared, own])
    is_target = np.arange(len(ids)) >= len(ids) - ANSWER
    return Example(input_ids=ids, is_target=is_target, image_starts=(), images=(), index=number)


def main() -> None:
    """Print the shape of the batch and the peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["eval", "train"])
    parser.add_argument("questions", type=int)
    parser.add_argument("in_a_row", type=int)
    parser.add_argument("--tokens", type=int, default=8765)
    given = parser.parse_args()
    examples = [example(number, given.in_a_row, given.tokens) for number in range(given.questions)]
    rows = [build_row(examples[start : start + given.in_a_row]) for start in range(0, len(examples), given.in_a_row)]
    batch = collate(rows, {}, (3, PX, PX))
    objective = Objective(make_llava(), VOCABULARY)

    def evaluate() -> None:
        records = {one.index: Record(id="", turns=()) for one in examples}
        asked = ask(rows, {one.index: one for one in examples}, records)
        answer_batch(objective, batch, asked, stop_ids=frozenset({2}), max_new_tokens=2)

    run = evaluate if given.kind == "eval" else lambda: objective(**batch).backward()
    peak = max(accumulate(compat.allocations(run), initial=0))
    print(f"{given.kind}, rows and tokens {tuple(batch['input_ids'].shape)}: {peak / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main()
