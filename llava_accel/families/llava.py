"""LLaVA-1.5 and models like it: an image is one square."""

from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_accel.families.family import Family


def _template(text: Any) -> str:
    return "mistral_instruct" if text.model_type == "mistral" else "v1"


LLAVA = Family(
    name="llava",
    title="LLaVA-1.5",
    config_class=LlavaConfig,
    model_class=LlavaForConditionalGeneration,
    aspect="(?!anyres).*",
    template=_template,
)
