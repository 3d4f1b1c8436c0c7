"""The figures of a GPU: LLaVA-1.5-7B's shapes with random weights, LoRA of rank 128, bf16, about 640 tokens a question.

    python tests/gpu/figures.py [--folder FOLDER] [--rounds 3]

Needs 80 GB of GPU memory and 14 GB of disk for the base, which stays in the folder. `--tiny` takes a model of two layers
in fp32 instead: it shows on any machine that the script works, and its figures say nothing.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_accel.bench import bench
from llava_accel.recipe import Recipe, make_recipe

QUICKSTART = Path(__file__).parents[2] / "llava_accel" / "quickstart" / "base"
WORDS = "what colour is the shape in this image and how many of them are there on the left".split()
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Row:
    """A figure, what it should reach, and whether that is the least or the most."""

    title: str
    value: float
    target: float
    unit: str
    is_limit: bool = False

    @property
    def is_reached(self) -> bool:
        return self.value <= self.target if self.is_limit else self.value >= self.target


def llava_config(tiny: bool, image_token_id: int) -> LlavaConfig:
    """The shapes of LLaVA-1.5-7B, or small ones."""
    if tiny:
        vision = CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=56,
            patch_size=14,
        )  # fmt: skip
        text = LlamaConfig(
            vocab_size=1088, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0,
        )  # fmt: skip
    else:
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14,
        )  # fmt: skip
        text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, pad_token_id=0)  # Llama-2-7B's defaults
    assert isinstance(vision.image_size, int) and isinstance(vision.patch_size, int)
    tokens = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token_id, image_seq_length=tokens
    )


def make_base(folder: Path, tiny: bool, weights: bool = True) -> Path:
    """Random weights in the hub's layout; `weights=False` leaves them out, which is enough for a plan."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    config = llava_config(tiny, tokenizer.convert_tokens_to_ids("<image>"))
    assert isinstance(config.vision_config, CLIPVisionConfig) and isinstance(config.vision_config.image_size, int)
    side = config.vision_config.image_size
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    if weights and not (folder / "complete").exists():
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        (folder / "complete").touch()
    return folder


def make_data(folder: Path, num_questions: int, a_image: int, side: int) -> Path:
    """Images of noise with questions of 15 words and answers of ten."""
    folder.mkdir(exist_ok=True)
    chance, pixels = random.Random(0), np.random.default_rng(0)
    records = []
    for number in range(num_questions):
        name = f"{number // a_image}.png"
        if not (folder / name).exists():
            Image.fromarray(pixels.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / name)
        question, answer = (" ".join(chance.choices(WORDS, k=count)) for count in (15, 10))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    path = folder / f"{num_questions}_{a_image}.json"
    path.write_text(json.dumps(records))
    return path


def make_recipe_for(
    folder: Path, base: Path, tiny: bool, batch: int, bits: int, again: bool, a_image: int = 1, share: bool = False
) -> Recipe:
    """One figure's recipe, and its data.

    Args:
        again: Checkpoint every layer.
        a_image: Questions on each image.
        share: Run an image's prefix once for all of its questions.
    """
    data = make_data(folder / f"{a_image}", batch * _steps(tiny), a_image, 56 if tiny else 336)
    model: dict[str, Any] = {"base": str(base), "gradient_checkpointing": again, "quantization": {"bits": bits}}
    return make_recipe(
        {
            "run": {"name": "gpu", "output_dir": str(folder / "run"), "precision": "fp32" if tiny else "bf16"},
            "model": {**model, "lora": {"rank": 8 if tiny else 128, "alpha": 16 if tiny else 256}},
            "data": {"train": str(data), "workers": 0 if tiny else 4, "share_prefix": share},
            "train": {"per_device_batch_size": batch},
        }
    )


def _steps(tiny: bool) -> int:
    return 1 if tiny else 4


def measure(folder: Path, tiny: bool, rounds: int) -> list[Row]:
    """All figures, each by `bench` on a recipe of its own."""
    base = make_base(folder / "base", tiny)

    def run(batch: int, bits: int, again: bool, a_image: int = 1, share: bool = False) -> dict[str, float]:
        return bench(make_recipe_for(folder, base, tiny, batch, bits, again, a_image, share), _steps(tiny), rounds)

    half, many, few = (2, 4, 2) if tiny else (8, 25, 2)
    lora = run(half, 16, False)
    lora_again, qlora_again = run(many, 16, True), run(many, 4, True)
    shared, apart = run(many // 5 * 5 or 5, 16, True, 5, True), run(many // 5 * 5 or 5, 16, True, 5, False)
    peak = run(few, 4, True)["peak_bytes"] / GIB
    quantised = qlora_again["tokens_per_s"] / lora_again["tokens_per_s"]
    return [
        Row("LoRA without checkpointing, MFU", 100 * lora["mfu"], 55, "%"),
        Row("QLoRA nf4 over LoRA, tokens/s at 16,000 tokens a micro-batch", quantised, 0.9, "x"),
        Row("QLoRA nf4, peak at 1,300 tokens a micro-batch", peak, 12e9 / GIB, "GiB", is_limit=True),
        Row("five questions an image, shared over apart", shared["examples_per_s"] / apart["examples_per_s"], 3, "x"),
    ]


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the base goes, and is looked for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small shapes in fp32, on any machine")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --tiny shows that the script works")
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        rows = measure(folder, options.tiny, options.rounds)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(title=f"{device}, torch {torch.__version__}{', tiny: of no meaning' if options.tiny else ''}")
    for column in ("figure", "measured", "target", "reached"):
        table.add_column(column)
    for row in rows:
        target = f"{'at most' if row.is_limit else 'at least'} {row.target:.1f} {row.unit}"
        table.add_row(row.title, f"{row.value:.2f} {row.unit}", target, "yes" if row.is_reached else "no")
    Console(width=120).print(table)
    return rows


if __name__ == "__main__":
    main()
