"""Whether rows of several images should hold their common system prompt once: CPU seconds of a step, by images in a row.

    OMP_NUM_THREADS=2 python tests/bench/system_prompt.py [--rounds 5] [--image-tokens 196]

The language model of eighty_million.py with LoRA on all of its linear layers, fp32, eight images with a question each.
Forward and backward of the same examples in turn: a row each, as training makes them, and rows of 2, 4 and 8 images that
hold once what comes before the image. Such a row needs a mask, and each token meets all others of the row.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[2]))

from llava_accel.data.collate import collate
from llava_accel.data.labels import Example
from llava_accel.data.trie import build_row
from llava_accel.model.objective import Objective

SYSTEM, QUESTION, ANSWER, ROWS = 35, 12, 2, 8
VOCABULARY = 32_000


def make_objective() -> Objective:
    """Its tower is of no account: image tokens are plain ones here."""
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(vocab_size=VOCABULARY, **sizes), image_token_index=3
    )
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(LlavaForConditionalGeneration(config), LoraConfig(r=8, target_modules=targets))
    return Objective(model.train(), VOCABULARY)


def make_examples(image_tokens: int) -> list[Example]:
    """Only the system prompt is common to two of them."""
    drawn, found = np.random.default_rng(0), []
    system = drawn.integers(4, VOCABULARY, SYSTEM)
    for number in range(ROWS):
        ids = np.concatenate([system, drawn.integers(4, VOCABULARY, image_tokens + QUESTION + ANSWER)])
        is_target = np.arange(len(ids)) >= len(ids) - ANSWER
        found.append(Example(input_ids=ids, is_target=is_target, image_starts=(), images=(), index=number))
    return found


def main() -> None:
    """Print a line for each number of images in a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-tokens", type=int, default=196)
    arguments = parser.parse_args()
    objective, examples = make_objective(), make_examples(arguments.image_tokens)
    batches, seconds = {}, {}
    for size in (1, 2, 4, 8):
        rows = [build_row(examples[start : start + size]) for start in range(0, ROWS, size)]
        batches[size], seconds[size] = collate(rows, {}, (3, 224, 224)), []
    for number in range(arguments.rounds + 1):  # the first is not counted
        losses = []
        for size, batch in batches.items():
            since = time.process_time()
            loss = objective(**batch)
            loss.backward()
            if number:
                seconds[size].append(time.process_time() - since)
            losses.append(loss.item())
        np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    for size, own in seconds.items():
        ratios = [alone / together for alone, together in zip(seconds[1], own, strict=True)]
        print(
            f"images in a row {size}: {batches[size]['input_ids'].numel():,} tokens, {median(own):.2f} CPU s, "
            f"{median(ratios):.2f} x as fast as alone ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
