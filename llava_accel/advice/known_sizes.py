"""Sizes of published bases, for a machine that has none of them: only the keys of a config that a plan needs."""

from typing import Any

from llava_accel.families.registry import FAMILIES

_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip


def _text(
    kind: str, width: int, inner: int, layers: int, heads: int, shared: int, rows: int, window: int
) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": width // heads, "vocab_size": rows,
        "max_position_embeddings": window,
    }  # fmt: skip


_VICUNA_7B = _text("llama", 4096, 11008, 32, 32, 32, 32064, 4096)
_VICUNA_13B = _text("llama", 5120, 13824, 40, 40, 40, 32064, 4096)
_TEXTS = {
    "llava": {"llava-1.5-7b-hf": _VICUNA_7B, "llava-1.5-13b-hf": _VICUNA_13B},
    "llava_next": {
        "llava-v1.6-vicuna-7b-hf": _VICUNA_7B,
        "llava-v1.6-vicuna-13b-hf": _VICUNA_13B,
        "llava-v1.6-mistral-7b-hf": _text("mistral", 4096, 14336, 32, 32, 8, 32064, 32768),
        "llava-v1.6-34b-hf": _text("llama", 7168, 20480, 60, 56, 8, 64064, 4096),
        "llama3-llava-next-8b-hf": _text("llama", 4096, 14336, 32, 32, 8, 128320, 8192),
    },
    "llava_onevision": {
        "llava-onevision-qwen2-0.5b": _text("qwen2", 896, 4864, 24, 14, 2, 152000, 32768),
        "llava-onevision-qwen2-7b": _text("qwen2", 3584, 18944, 28, 28, 4, 152128, 32768),
        "llava-onevision-qwen2-72b": _text("qwen2", 8192, 29568, 80, 64, 8, 152128, 32768),
    },
}
"""Family -> how the name of a base on the hub begins, without its owner -> the sizes of its language model."""
_TIED = "llava-onevision-qwen2-0.5b"
_PARTS = ("lmsys/vicuna-7b-v1.5", "openai/clip-vit-large-patch14-336")
"""The parts of LLaVA-1.5-7B."""
DEFAULT = "llava-1.5-7b-hf"


def published_config(name: str) -> dict[str, Any] | None:
    """The keys of config.json that a plan needs, for a base on the hub; None where its sizes are not known."""
    owner, _, short = name.partition("/")
    for family, texts in _TEXTS.items():
        for start, text in texts.items():
            if owner == "llava-hf" and short.startswith(start):
                return _config(family, text, is_tied=start == _TIED)
    return None


def whole_name(base: str, language_model: str, vision_tower: str) -> str:
    """The base that a recipe names, or the one that has the same sizes as the parts that it names."""
    return f"llava-hf/{DEFAULT}" if (language_model, vision_tower) == _PARTS else base or language_model


def _config(family: str, text: dict[str, Any], is_tied: bool) -> dict[str, Any]:
    vision = _SIGLIP if family == "llava_onevision" else _CLIP
    config: dict[str, Any] = {
        "model_type": family,
        "text_config": text | {"tie_word_embeddings": is_tied},
        "vision_config": vision,
        "tie_word_embeddings": is_tied,
        "vision_feature_layer": -1 if vision is _SIGLIP else -2,
        "vision_feature_select_strategy": "full" if vision is _SIGLIP else "default",
    }
    if family == "llava":
        return config | {"image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2}
    pinpoints = [list(pair) for pair in FAMILIES[family].released(vision["image_size"])]
    more = {"vision_aspect_ratio": "anyres_max_9"} if family == "llava_onevision" else {}
    return config | {"image_grid_pinpoints": pinpoints, **more}
