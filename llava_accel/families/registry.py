"""Every family of LLaVA that is trained here: the one place that lists them."""

from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from llava_accel.families.llava import LLAVA
from llava_accel.families.next import NEXT
from llava_accel.families.onevision import ONEVISION

FAMILIES = {family.name: family for family in (LLAVA, NEXT, ONEVISION)}
"""By transformers' model_type. If an original's config fits several, the first is meant."""

Llava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration
Config = LlavaConfig | LlavaNextConfig | LlavaOnevisionConfig
"""The types of a model and of its config, whatever the family."""

OTHERS = {
    "llava_next_video": "LLaVA-NeXT-Video, whose frames are pooled",
    "video_llava": "Video-LLaVA, which has a tower for videos",
    "vipllava": "ViP-LLaVA, which joins several layers of its tower",
    "llavaonevision1_5": "LLaVA-OneVision-1.5, whose tower takes images of any size and which needs code of its own",
    "mobilevlm": "MobileVLM, whose projector is an LDP",
    "mobilellama": "MobileVLM, whose projector is an LDP",
}
"""Models of other families that are often taken for one of these: model_type -> what it is."""
TITLES = "LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision"
