"""The figures of the README for a CPU: a LLaVA of about 80 M weights with random ones, in fp32, against a Trainer.

    OMP_NUM_THREADS=2 python tests/bench/eighty_million.py [--steps 5] [--rounds 5]

Tower 12 layers of 384 (196 image tokens), language model 8 layers of 512 with 32,000 rows, LoRA of rank 8 and the
projector; one question a picture, and 9.6 questions a picture as easy-VQA has them.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import make_tokenizer

from llava_accel.bench import bench
from llava_accel.recipe import make_recipe

SIDE, ROWS = 224, 32_000
WORDS = "what colour is the shape in this picture and how many of them are there on the left".split()


def make_base(folder: Path) -> Path:
    """The model, in the hub's layout."""
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=16,
    )
    text = LlamaConfig(
        vocab_size=ROWS, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    token = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token, image_seq_length=196)
    model = LlavaForConditionalGeneration(config)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M weights")
    model.save_pretrained(folder)
    return folder


def make_data(folder: Path, num_questions: int, a_picture: float) -> Path:
    """Pictures of noise, with questions of unequal length and short answers."""
    folder.mkdir()
    chance, pixels = random.Random(0), np.random.default_rng(0)
    records = []
    for number in range(num_questions):
        name = f"{int(number / a_picture)}.png"
        if not (folder / name).exists():
            Image.fromarray(pixels.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / name)
        question = " ".join(chance.choices(WORDS, k=chance.randint(4, 14)))
        answer = " ".join(chance.choices(WORDS, k=chance.randint(1, 3)))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def main() -> None:
    """Print one table for each kind of data, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, found = Path(place), {}
        base = make_base(folder / "base")
        for name, a_picture, share in (("one question a picture", 1.0, False), ("9.6 questions a picture", 9.6, True)):
            data = make_data(folder / name.replace(" ", "_"), 16 * arguments.steps, a_picture)
            recipe = make_recipe(
                {
                    "run": {"name": "bench", "output_dir": str(folder / "run"), "precision": "fp32"},
                    "model": {"base": str(base), "lora": {"rank": 8, "alpha": 16}},
                    "data": {"train": str(data), "workers": 0, "share_prefix": share},
                    "train": {"per_device_batch_size": 16},
                }
            )
            found[name] = bench(recipe, arguments.steps, arguments.rounds, "trainer")
    for name, values in found.items():
        print(f"{name}: {values['ratio_cold']:.2f} x with a cold cache, {values['ratio']:.2f} x warm")


if __name__ == "__main__":
    main()
