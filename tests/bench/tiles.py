"""How much faster, and in how much less memory, five questions on an image of five tiles train, against a Trainer.

    OMP_NUM_THREADS=2 python tests/bench/tiles.py [--images 2] [--steps 1] [--rounds 3] [--dropout 0.05]

A LLaVA-NeXT with the sizes of eighty_million.py: 1,008 image tokens of five tiles of 224 pixels, LoRA of rank 8 and the
projector, fp32. A step sees all questions of some images. The other side is transformers' own LlavaNext under a Trainer: a
row for each question, padding, all logits, and the tower in every step.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import easy_vqa
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.eighty_million import QUICKSTART, ROWS, SIDE
from bench.plain_trainer import compare
from llava_accel.recipe import make_recipe

QUESTIONS = 5  # an image
ACROSS = 2  # tiles


def make_base(folder: Path, width: int = 512, layers: int = 8, tower_layers: int = 12) -> Path:
    """The model, in the hub's layout, with the quickstart's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=tower_layers,
        num_attention_heads=6,
        image_size=SIDE,
        patch_size=16,
    )
    text = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=width,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[ACROSS * SIDE, ACROSS * SIDE]],
    )
    model = LlavaNextForConditionalGeneration(config)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M weights")
    model.save_pretrained(folder)
    return folder


def make_data(folder: Path, num_images: int) -> Path:
    """Questions of easy-VQA on images of noise that fill their canvas."""
    folder.mkdir()
    pixels, records = np.random.default_rng(0), []
    questions = list(zip(*easy_vqa.get_train_questions()[:2], strict=True))
    for number, (question, answer) in enumerate(questions[: num_images * QUESTIONS]):
        name = f"{number // QUESTIONS}.png"
        if number % QUESTIONS == 0:
            noise = pixels.integers(0, 255, (ACROSS * SIDE, ACROSS * SIDE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name)
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def main() -> None:
    """Print a table, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2, help="of a step")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.05, help="of the LoRA layers")
    parser.add_argument("--small", action="store_true", help="two layers, to try the script itself")
    arguments = parser.parse_args()
    sizes = {"width": 128, "layers": 2, "tower_layers": 2} if arguments.small else {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = make_base(folder / "base", **sizes)
        recipe = make_recipe(
            {
                "run": {"name": "bench", "output_dir": str(folder / "run"), "precision": "fp32"},
                "model": {"base": str(base), "lora": {"rank": 8, "alpha": 16, "dropout": arguments.dropout}},
                "data": {
                    "train": str(make_data(folder / "data", arguments.images * arguments.steps)),
                    "workers": 0,
                    "share_prefix": True,
                },
                "train": {"per_device_batch_size": arguments.images * QUESTIONS},
            }
        )
        values = compare(recipe, arguments.steps, arguments.rounds)
    print(
        f"five questions on an image of five tiles: {values['ratio_cold']:.2f} x with a cold cache, {values['ratio']:.2f} x "
        f"warm, {values['memory_ratio']:.2f} x the memory"
    )


if __name__ == "__main__":
    main()
