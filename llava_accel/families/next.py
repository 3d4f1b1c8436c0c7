"""LLaVA-NeXT (1.6): an image is cut into up to four tiles, and a newline ends each row of its tokens."""

from typing import Any

from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from llava_accel.families.family import Family

_LLAMA_3, _YI = 128_000, 64_000
"""Rows of the vocabularies that tell the language models of Llama's form apart; Vicuna has 32,000."""


def _template(text: Any) -> str:
    if text.model_type in ("mistral", "qwen2"):
        return {"mistral": "mistral_instruct", "qwen2": "qwen_1_5"}[text.model_type]
    return "llava_llama_3" if text.vocab_size >= _LLAMA_3 else "chatml" if text.vocab_size >= _YI else "v1"


NEXT = Family(
    name="llava_next",
    title="LLaVA-NeXT",
    config_class=LlavaNextConfig,
    model_class=LlavaNextForConditionalGeneration,
    aspect="anyres|pad|square",
    template=_template,
    image_placement="start_if_single",
    grids=((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
    processor=("LlavaNextProcessor", "LlavaNextImageProcessor"),
    original_aspect=lambda config: "anyres",
)
