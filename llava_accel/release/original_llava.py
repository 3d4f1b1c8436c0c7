"""Exports for LLaVA's own code: its files and key names, its config.json, and the vision tower where it looks for it."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig

from llava_accel.exceptions import UserError
from llava_accel.families.family import num_class_tokens
from llava_accel.families.original import ASPECTS, CLASSES
from llava_accel.model import layouts
from llava_accel.model.bases import Base
from llava_accel.model.files import read_json, read_tensors, read_weights
from llava_accel.model.lora import adapts_projector, merged_projector, split_state
from llava_accel.model.processing import Processing, load_image_processor
from llava_accel.model.save import ADAPTER
from llava_accel.model.saved_processor import save_tokenizer
from llava_accel.model.tower import num_tower_layers
from llava_accel.recipe import Recipe
from llava_accel.release.merged_model import stored_form

_TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip

TOWER_FOLDER = "vision_tower"
_CLIP_L_336 = "openai/clip-vit-large-patch14-336"
_CLIP_L_336_SIZES = (1024, 24, 14, 336)
_SIGLIP = "google/siglip-so400m-patch14-384"
_SIGLIP_SIZES = (1152, 26, 14, 384)
"""Width, layers that are used, and pixels of a patch and of an image, of the only SigLIP in LLaVA's own code."""
_TEXT_KEYS = (
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps", "sliding_window", "tie_word_embeddings",
    "use_sliding_window", "max_window_layers", "vocab_size",
)  # fmt: skip
_SAME_FOR_ALL = {
    "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
    "use_cache": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """What an export is made from: the model's configs, the base that it was trained on if that is here, and its recipe.

    `is_whole`: the export holds the whole model, so it must not point to a tower next to the base that it came from.
    """

    base: Base
    origin: Base | None
    recipe: Recipe
    is_whole: bool


def save_original_adapter(
    folder: Path, model: PeftModel, state: Mapping[str, Tensor], config: dict[str, Any]
) -> dict[str, Tensor]:
    """Write the files of LLaVA's LoRA training: adapter, non_lora_trainables.bin and `config` (`original_config`).

    LLaVA puts no LoRA layers on the projector: what they have learnt is folded into its weights.

    Args:
        state: The model's weights under its own names; those that only the base has are not read.

    Returns:
        The tensors that were written, under in-memory names, as the next two functions do.

    Raises:
        UserError: the adapter is of a variant that LLaVA's peft would not compute.
    """
    adapter, rest = split_state(model, state)
    if adapts_projector(model):
        adapter = {name: tensor for name, tensor in adapter.items() if layouts.PROJECTOR not in name}
        rest |= merged_projector(model, state)
    peft_config = model.peft_config["default"]
    assert isinstance(peft_config, LoraConfig)
    merge = "Export --to merged, and that folder --to llava"
    if peft_config.init_lora_weights is not True:
        raise UserError(
            f"model.lora.variant = {peft_config.init_lora_weights!r} starts from changed weights of the base, which "
            f"the peft of LLaVA's time does not compute. {merge}"
        )
    if peft_config.use_dora or peft_config.use_rslora:
        raise UserError(
            f"model.lora.variant = {'dora' if peft_config.use_dora else 'rslora'!r}: the peft of LLaVA's time does not know "
            f"it, and would compute plain LoRA without a word. {merge}"
        )
    _write_json(folder / "adapter_config.json", _adapter_config(peft_config, list(adapter)))
    tensors = {layouts.adapter_to_original(name): stored_form(tensor) for name, tensor in adapter.items()}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    trainables = {layouts.trainable_to_original(name): stored_form(tensor) for name, tensor in rest.items()}
    torch.save(trainables, folder / "non_lora_trainables.bin")
    _write_json(folder / "config.json", config)
    return {**adapter, **rest}


def save_original_projector(folder: Path, state: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Write the files of LLaVA's stage 1: mm_projector.bin and config.json."""
    kept = {name: stored_form(tensor) for name, tensor in state.items() if name.startswith(layouts.CONNECTION)}
    torch.save({layouts.to_original(name): tensor for name, tensor in kept.items()}, folder / "mm_projector.bin")
    _write_json(folder / "config.json", config)
    return kept


def save_original_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    processing: Processing,
    config: dict[str, Any],
    source: Source,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Write a whole model: weights in shards of 5 GB, config.json, generation_config.json and the tokenizer.

    Rows that were added to the vocabulary for the image token, which LLaVA does not have, are cut off.

    Args:
        source: The tokenizer files of its origin are copied, as LLaVA needs tokenizer.model.
        dtype: Float type of the weights on disk.
    """
    rows = processing.vocab_size
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and processing.base.config.tie_word_embeddings:
            continue
        # A copy, because safetensors does not store a part of a larger tensor.
        kept = tensor[:rows].clone() if name in layouts.VOCABULARY else tensor
        state[name] = stored_form(kept.to(dtype) if kept.is_floating_point() else kept)
    original = {layouts.to_original(name): tensor for name, tensor in state.items()}
    save_torch_state_dict(original, folder, max_shard_size="5GB")
    _write_json(folder / "config.json", config | {"vocab_size": rows, "torch_dtype": str(dtype).removeprefix("torch.")})
    ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    _write_tokenizer(folder, processing, source.origin)
    return state


def read_original(folder: Path) -> dict[str, Tensor]:
    """Every weight that one of these functions wrote, under in-memory names."""
    tensors: dict[str, Tensor] = {}
    for file, rename in (
        (ADAPTER, layouts.adapter_to_memory),
        ("non_lora_trainables.bin", layouts.trainable_to_memory),
        ("mm_projector.bin", layouts.to_memory),
    ):
        if (folder / file).is_file():
            tensors |= {rename(tensor.name): tensor.read() for tensor in read_tensors(folder / file)}
    return tensors or {layouts.to_memory(tensor.name): tensor.read() for tensor in read_weights(folder)}


def _write_tokenizer(folder: Path, processing: Processing, origin: Base | None) -> None:
    places = [base.folder for base in (origin, processing.base) if base]
    source = next((place for place in places if (place / "tokenizer.model").is_file()), None)
    if source is None:
        save_tokenizer(folder, processing.processor.tokenizer)
    else:
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if (folder / "tokenizer.json").is_file():
        _write_for_old_versions(folder / "tokenizer.json")


def _write_for_old_versions(path: Path) -> None:
    """Rewrite a tokenizer.json for `tokenizers` before 0.20, which LLaVA's code has: it knows merges as texts alone, and
    asks for a key that newer versions left out."""
    spec = json.loads(path.read_text(encoding="utf-8"))
    merges, pre_tokenizer = spec["model"].get("merges"), spec.get("pre_tokenizer") or {}
    if merges and isinstance(merges[0], list) and not any(" " in token for pair in merges for token in pair):
        spec["model"]["merges"] = [" ".join(pair) for pair in merges]
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if part.get("type") == "Metaspace":
            part.setdefault("add_prefix_space", part.get("prepend_scheme") != "never")
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")


def _adapter_config(config: LoraConfig, names: list[str]) -> dict[str, Any]:
    """adapter_config.json with the keys that every peft since 0.4 knows, and leaf names as targets."""
    leaves = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names}
    return {
        "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": config.base_model_name_or_path,
        "bias": config.bias, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}, "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": None, "peft_type": "LORA", "r": config.r, "rank_pattern": {}, "revision": None,
        "target_modules": sorted(leaves), "task_type": "CAUSAL_LM",
    }  # fmt: skip


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def original_config(source: Source, tower: str) -> dict[str, Any]:
    """The config for a model of LLaVA's own code; the origin's config.json is kept if it is already one, but for the
    model's names: LLaVA's code does not know ShareGPT4V's, and "llava" is transformers' name too.

    Args:
        tower: Value of mm_vision_tower.

    Raises:
        UserError: LLaVA's own code has no such model.
    """
    origin, recipe = source.origin, source.recipe
    original = origin.folder / "config.json" if origin and origin.layout == "original" else None
    config = read_json(original) if original else _from_transformers(source.base)
    base, aspect = source.base, source.base.image_aspect(recipe.data.image_aspect)
    if aspect not in ASPECTS:
        raise UserError(
            f"data.image_aspect = {aspect!r}: LLaVA's own code pads or crops an image and does not stretch it. Use "
            "--to merged or --to peft"
        )
    # LLaVA's own code reads the weights of a tower that are in the model only if it was told that the tower was trained.
    kept_inside = {} if isinstance(base.vision, CLIPVisionConfig) else {"unfreeze_mm_vision_tower": True}
    # It loads an adapter or a projector of a Mistral as a Llama, whose code asks the config for these.
    as_llama = {"attention_bias": False, "pretraining_tp": 1} if base.text.model_type == "mistral" else {}
    model_type, architecture = CLASSES[base.text.model_type]
    return (
        as_llama
        | config
        | base.family.original_keys(base.config, ASPECTS[aspect])
        | kept_inside
        | {
            "model_type": model_type,
            "architectures": [architecture],
            "mm_vision_tower": tower,
            "tokenizer_model_max_length": recipe.data.max_length,
            "tune_mm_mlp_adapter": recipe.model.train == "projector",
            "freeze_mm_mlp_adapter": not (recipe.model.train_projector or recipe.model.adapts_projector),
        }
    )


def place_tower(folder: Path, tower: Callable[[], Mapping[str, Tensor]], source: Source) -> str:
    """The value of mm_vision_tower; the tower itself is written into `folder` where no name leads to it.

    LLaVA's own code takes a CLIP from the place that mm_vision_tower names. It makes a SigLIP by its name alone, and then
    takes the weights that are in the model, if any.

    Args:
        tower: Returns the tower's weights by their names in it.

    Raises:
        UserError: LLaVA's own code cannot use this tower.
    """
    base, origin, recipe, vision = source.base, source.origin, source.recipe, source.base.vision
    named = recipe.model.vision_tower
    if not named and origin and origin.layout == "original":
        named = str(read_json(origin.folder / "config.json").get("mm_vision_tower", ""))
    is_clip = isinstance(vision, CLIPVisionConfig)
    num_layers = vision.num_hidden_layers if is_clip else num_tower_layers(base.config)
    sizes = (vision.hidden_size, num_layers, vision.patch_size, vision.image_size)
    if not named and sizes == _CLIP_L_336_SIZES:
        named = _CLIP_L_336
    beside = [origin.folder / named, origin.folder.parent / named] if origin else []
    is_local = any(map(os.path.isdir, (*beside, os.path.expanduser(named))))
    if named and not recipe.model.train_vision and not (source.is_whole and is_local):
        return named
    if not is_clip:
        if sizes != _SIGLIP_SIZES or (recipe.model.train_vision and not source.is_whole):
            raise UserError(
                f"LLaVA's own code has one SigLIP tower, {_SIGLIP}, and takes a trained one from a whole model alone. Use "
                "--to merged or --to peft; a merged model with a tower of that size can then be exported --to llava"
            )
        return _SIGLIP
    place = folder / TOWER_FOLDER
    place.mkdir()
    tensors = {f"vision_model.{name}": stored_form(tensor) for name, tensor in tower().items()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = vision.__class__.from_dict(vision.to_dict())
    config.name_or_path, config.architectures = "", ["CLIPVisionModel"]
    config.save_pretrained(place)
    load_image_processor(base.tower or base.folder, vision, "crop").save_pretrained(place)
    return TOWER_FOLDER


def _from_transformers(base: Base) -> dict[str, Any]:
    text, config = base.text, base.config
    if text.model_type not in CLASSES:
        raise UserError(
            f"LLaVA's own code has no {text.model_type!r} language model, only Llama, Mistral and Qwen2. Use --to merged"
        )
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise UserError(
            "LLaVA's own projector (mlp2x_gelu) has GELU and biases, and this projector does not. Use --to merged"
        )
    keeps_class_token = config.vision_feature_select_strategy == "full" and num_class_tokens(base.vision) > 0
    known = text.to_dict()
    rope = dict(known.get("rope_parameters") or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    return {
        **{key: known[key] for key in _TEXT_KEYS if key in known},
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "torch_dtype": str(text.dtype or torch.float16).removeprefix("torch."),
        "mm_hidden_size": base.vision.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer if isinstance(base.vision, CLIPVisionConfig) else -2,
        "mm_vision_select_feature": "cls_patch" if keeps_class_token else "patch",
        **_SAME_FOR_ALL,
    }
