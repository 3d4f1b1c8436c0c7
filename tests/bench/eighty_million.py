"""How much faster, and in how much less memory, a LLaVA of 80 M weights trains on two CPU cores, against a Trainer.

    OMP_NUM_THREADS=2 python tests/bench/eighty_million.py [one | many] [--steps 2] [--batch 8] [--rounds 3] [--dropout 0.05]

Tower 12 layers of 384 (196 image tokens), language model 8 layers of 512 with 32,000 rows, LoRA of rank 8 and
the projector, fp32. "one": one question an image; "many": the questions of easy-VQA, 9.6 an image. A step
of the Trainer takes seconds: five minutes in all.

    OMP_NUM_THREADS=2 python tests/bench/eighty_million.py one --steps 4 --keep FOLDER

measures nothing and writes the base, the data and a recipe, FOLDER/one.toml, for `llava-accel bench`.
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
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.plain_trainer import compare
from llava_accel.recipe import Recipe, dump_recipe, make_recipe

QUICKSTART = Path(__file__).parents[2] / "llava_accel" / "quickstart" / "base"
SIDE, ROWS = 224, 32_000
KINDS = {"one": "one question an image", "many": "easy-VQA, 9.6 questions an image"}


def make_base(folder: Path) -> Path:
    """The model, in the hub's layout. The quickstart's tokenizer has whole words, so lengths are those of a real one."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
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
        vocab_size=ROWS,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token, image_seq_length=196)
    model = LlavaForConditionalGeneration(config)
    print(f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.0f} M weights")
    model.save_pretrained(folder)
    return folder


def make_data(folder: Path, kind: str, num_questions: int) -> Path:
    """The first questions of easy-VQA, on images of noise: their own, or one for each."""
    folder.mkdir()
    pixels = np.random.default_rng(0)
    records, rows = [], sorted(zip(*easy_vqa.get_train_questions(), strict=True), key=lambda row: row[2])
    for number, (question, answer, image) in enumerate(rows[:num_questions]):
        name = f"{image if kind == 'many' else number}.png"
        if not (folder / name).exists():
            Image.fromarray(pixels.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / name)
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def make_recipes(folder: Path, kinds: list[str], arguments: argparse.Namespace) -> dict[str, Recipe]:
    """A recipe for each kind of data, on one base."""
    base = make_base(folder / "base")
    return {
        kind: make_recipe(
            {
                "run": {"name": "bench", "output_dir": str(folder / "run"), "precision": "fp32"},
                "model": {"base": str(base), "lora": {"rank": 8, "alpha": 16, "dropout": arguments.dropout}},
                "data": {
                    "train": str(make_data(folder / kind, kind, arguments.batch * arguments.steps)),
                    "workers": 0,
                    "share_prefix": kind == "many",
                },
                "train": {"per_device_batch_size": arguments.batch},
            }
        )
        for kind in kinds
    }


def main() -> None:
    """Print a table for each kind of data, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS, help="one kind of data alone")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.05, help="of the LoRA layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write base, data and recipes into it, and end")
    arguments = parser.parse_args()
    kinds = [arguments.kind] if arguments.kind else list(KINDS)
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        for kind, recipe in make_recipes(arguments.keep, kinds, arguments).items():
            (arguments.keep / f"{kind}.toml").write_text(dump_recipe(recipe))
        return
    with tempfile.TemporaryDirectory() as place:
        recipes = make_recipes(Path(place), kinds, arguments)
        found = {kind: compare(recipe, arguments.steps, arguments.rounds) for kind, recipe in recipes.items()}
    for kind, values in found.items():
        print(
            f"{KINDS[kind]}: {values['ratio_cold']:.2f} x with a cold cache, {values['ratio']:.2f} x warm, "
            f"{values['memory_ratio']:.2f} x the memory"
        )


if __name__ == "__main__":
    main()
