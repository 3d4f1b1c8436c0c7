"""A base of LLaVA-1.5-7B's shapes with random weights, or a tiny one, and data of noise, for the figures."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_accel.advice.stand_in import write_known

QUICKSTART = Path(__file__).parents[2] / "llava_accel" / "quickstart" / "base"
WORDS = "what colour is the shape in this image and how many of them are there on the left".split()


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
        _save_random(LlavaForConditionalGeneration, config, folder)
    return folder


def _save_random(model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = model_class._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "complete").touch()


def make_data(folder: Path, num_questions: int, a_image: int, side: int) -> Path:
    """Images of noise with questions of 15 words and answers of ten."""
    folder.mkdir(parents=True, exist_ok=True)
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


def make_next(folder: Path, tiny: bool) -> Path:
    """Random weights of LLaVA-NeXT 7B's shapes, or of small ones, in the hub's layout."""
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_known("llava-hf/llava-v1.6-vicuna-7b-hf", folder)
    if tiny:
        raw = json.loads((folder / "config.json").read_text())
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        raw["text_config"] |= small | {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 1088}
        raw["vision_config"] |= small
        (folder / "config.json").write_text(json.dumps(raw))
    config = LlavaNextConfig.from_pretrained(folder)
    _save_random(LlavaNextForConditionalGeneration, config, folder)
    return folder
