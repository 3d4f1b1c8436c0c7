"""Bounds on the numbers in a base's JSON files.

transformers takes most values as they come. Those outside these bounds end in a traceback much later, in a model that
computes nonsense, or in work that never ends.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from llava_accel.exceptions import UserError
from llava_accel.families.registry import Config

_WHOLE = {
    "vocab_size": (1, 2**22), "hidden_size": (1, 2**17), "intermediate_size": (1, 2**20), "head_dim": (1, 2**14),
    "num_hidden_layers": (1, 512), "num_attention_heads": (1, 2**12), "num_key_value_heads": (1, 2**12),
    "max_position_embeddings": (1, 2**31), "original_max_position_embeddings": (1, 2**31), "sliding_window": (1, 2**31),
    "n_layer": (1, 512), "num_layers": (1, 512), "n_head": (1, 2**12), "num_heads": (1, 2**12), "n_embd": (1, 2**17),
    "d_model": (1, 2**17), "n_inner": (1, 2**20), "ffn_dim": (1, 2**20), "n_positions": (1, 2**31),
    "max_window_layers": (0, 2**31), "num_experts": (0, 2**12), "num_local_experts": (0, 2**12),
    "num_experts_per_tok": (0, 2**12), "moe_intermediate_size": (0, 2**20), "image_size": (1, 2**13),
    "patch_size": (1, 2**12), "num_channels": (3, 3), "image_token_index": (0, 2**22), "image_token_id": (0, 2**22),
    "scored_vocab_size": (1, 2**22), "mm_vision_select_layer": (-512, 512),
}  # fmt: skip
"""Key of a config.json, at any level -> the least and the largest whole number that it can be."""
_REAL = {
    "rms_norm_eps": (1e-20, 0.1), "layer_norm_eps": (1e-20, 0.1), "layer_norm_epsilon": (1e-20, 0.1),
    "norm_eps": (1e-20, 0.1), "rope_theta": (1e-3, 1e15), "partial_rotary_factor": (1e-3, 1), "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-3, 1e6), "high_freq_factor": (1e-3, 1e6), "beta_fast": (1e-3, 1e6), "beta_slow": (1e-3, 1e6),
    "attention_factor": (1e-3, 1e3), "attention_dropout": (0, 1), "hidden_dropout": (0, 1),
    "short_factor": (1e-3, 1e6), "long_factor": (1e-3, 1e6),
}  # fmt: skip
"""The same for real numbers."""
_LISTS = {"intermediate_size", "short_factor", "long_factor"}
"""Keys that some models give for each layer, or each dimension."""
_NEEDED = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "num_channels", "rms_norm_eps", "layer_norm_eps", "attention_dropout",
}  # fmt: skip
"""Keys for which null does not mean transformers' default."""
_NAMES = {"model_type", "rope_type", "hidden_act", "hidden_activation", "projector_hidden_act"}
_PIXELS = {"image_mean": (-1e3, 1e3), "image_std": (1e-3, 1e3), "rescale_factor": (1e-6, 10), "resample": (0, 5)}
"""Key of an image processor -> bounds of each of its numbers."""
IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where an image processor is, the newer form first."""
_EDGES = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"longest_edge"})
_LARGEST_EDGE = 2**13
_BY_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_REMEDY = "Copy the file that belongs to the weights"


def check_numbers(raw: Mapping[str, Any], file: Path) -> None:
    """Compare what a config.json holds with these bounds, before it is used; UserError names the key."""
    for place, key, value in _entries(raw, ""):
        wanted = _wanted(key, value)
        if wanted:
            raise UserError(f"{file}: {place} is {_shown(value)}, and must be {wanted}. {_REMEDY}")


def _wanted(key: str, value: Any) -> str:
    """What the value of a key must be; "" if it is that, or may be anything."""
    if callable(getattr(LlavaConfig, key, None)):
        return "left out: it is the name of a function of transformers"
    if key in _NAMES:
        return "" if isinstance(value, str) or (value is None and key == "model_type") else "a name"
    if key in ("dtype", "torch_dtype"):
        return (
            "" if value is None or isinstance(getattr(torch, str(value), None), torch.dtype) else "the name of a type"
        )
    bounds, kind = (_WHOLE.get(key), int) if key in _WHOLE else (_REAL.get(key), float)
    if bounds is None or (value is None and key not in _NEEDED):
        return ""
    low, high = bounds
    numbers = value if isinstance(value, list) and key in _LISTS else [value]
    if all((type(each) is int or type(each) is kind) and low <= each <= high for each in numbers):
        return ""
    return f"a {'whole number' if kind is int else 'number'} from {low:,} to {high:,}"


def check_length(settings: Mapping[str, Any], file: Path) -> None:
    """UserError if model_max_length in a tokenizer_config.json is not a number of tokens."""
    value = settings.get("model_max_length")
    if value is not None and not (_is_number(value) and value >= 1):
        raise UserError(f"{file}: model_max_length is {_shown(value)}, and must be a number of tokens. {_REMEDY}")


def check_sizes(config: Config, file: Path, tower_file: Path) -> None:
    """Check that sizes fit each other, once transformers has filled in what the files leave out.

    Args:
        file, tower_file: Where the two halves of `config` come from.

    Raises:
        UserError: they do not, so the model could not be computed.
    """
    text: Any = config.text_config
    vision: Any = config.vision_config
    if not isinstance(getattr(text, "vocab_size", None), int):
        raise UserError(f"{file}: a {text.model_type!r} has no vocabulary of its own. Name a causal language model")
    heads, key_heads = getattr(text, "num_attention_heads", 1), getattr(text, "num_key_value_heads", None) or 1
    layer, depth = config.vision_feature_layer, vision.num_hidden_layers
    scored = getattr(config, "scored_vocab_size", None) or text.vocab_size
    if heads % key_heads:
        problem = f"num_attention_heads is {heads}, which is not a multiple of num_key_value_heads, {key_heads}"
    elif not layer or not -depth - 1 <= layer <= depth:
        problem = f"the selected layer of the vision tower is {layer}, and it has {depth}"
    elif scored > text.vocab_size:
        problem = f"scored_vocab_size is {scored}, and vocab_size only {text.vocab_size}"
    elif vision.patch_size > vision.image_size:
        file, problem = tower_file, f"patch_size is {vision.patch_size}, and image_size only {vision.image_size}"
    else:
        check_ids(text.to_dict(), text.vocab_size, file)
        return
    raise UserError(f"{file}: {problem}. {_REMEDY}")


def check_ids(ids: Mapping[str, Any], num_rows: int, file: Path) -> None:
    """Compare the ids of special tokens with the rows of the vocabulary; -1 means none. UserError names the key."""
    for key in _BY_TOKENS:
        value = ids.get(key)
        several = value if isinstance(value, list) and value and key == "eos_token_id" else [value]
        for each in several:
            if each is not None and (type(each) is not int or not -1 <= each < num_rows):
                raise UserError(
                    f"{file}: {key} is {_shown(value)}, and the vocabulary has ids from 0 to {num_rows - 1:,}. "
                    "Write the id that the tokenizer has for it, or copy the file that belongs to the weights"
                )


def check_pixels(settings: Mapping[str, Any], folder: Path) -> None:
    """Compare the settings of a folder's image processor with these bounds; UserError names the key."""
    file = next((path for path in (folder / name for name in IMAGE_FILES) if path.exists()), folder)
    for key, (low, high) in _PIXELS.items():
        value = settings.get(key)
        numbers = value if isinstance(value, list | tuple) else [value]
        wanted = 3 if key in ("image_mean", "image_std") else 1
        if len(numbers) != wanted or not all(_is_number(each) and low <= each <= high for each in numbers):
            each = "3 numbers" if wanted == 3 else "a number"
            raise UserError(f"{file}: {key} is {_shown(value)}, and must be {each} from {low:g} to {high:g}. {_REMEDY}")
    for key in ("size", "crop_size"):
        edges = settings.get(key)
        if edges is None and key == "crop_size" and not settings.get("do_center_crop"):
            continue
        known = edges.values() if isinstance(edges, dict) and set(edges) in _EDGES else [0]
        if not all(type(edge) is int and 0 < edge <= _LARGEST_EDGE for edge in known):
            wanted = f"name height and width, or the shortest_edge, of 1 to {_LARGEST_EDGE:,} px"
            raise UserError(f"{file}: {key} is {_shown(edges)}, and must {wanted}. {_REMEDY}")
    for key, value in settings.items():
        if key.startswith("do_") and not isinstance(value, bool | None):  # SigLIP's are saved with null for "no"
            raise UserError(f"{file}: {key} is {_shown(value)}, and must be true or false. {_REMEDY}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def blamed(raw: Mapping[str, Any], error: str) -> str:
    """The keys of a config whose values occur in a library's error; "" if none does."""
    return ", ".join(
        f"{place} is {_shown(value)}"
        for place, _, value in _entries(raw, "")
        if isinstance(value, str) and (f"'{value}'" in error or f": {value}." in error)
    )


def _entries(value: Mapping[str, Any], place: str) -> Iterator[tuple[str, str, Any]]:
    """Place, key and value of every entry, nested ones too."""
    for key, inner in value.items():
        yield f"{place}{key}", key, inner
        if isinstance(inner, dict):
            yield from _entries(inner, f"{place}{key}.")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:59]}…"
