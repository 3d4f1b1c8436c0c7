"""Exports for plain transformers and peft: an adapter with its projector inside, or one whole model."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from llava_accel.model.layouts import LANGUAGE_MODEL, NEWLINE, PEFT_PREFIX, PROJECTOR, TOWER
from llava_accel.model.lora import Trainable, adapts_projector, split_state
from llava_accel.model.processing import Processing
from llava_accel.model.save import ADAPTER
from llava_accel.model.saved_processor import mend_config, save_processor


def save_peft(folder: Path, model: PeftModel, state: Mapping[str, Tensor], processing: Processing) -> None:
    """Write an adapter that `PeftModel.from_pretrained(base, folder)` alone restores, and the processor.

    The projector, unless it has LoRA layers, and the vision tower where it was trained, are in it as peft's modules to
    save.

    Args:
        state: The model's weights under its own names; those that only the base has are not read.
    """
    stored, rest = split_state(model, state)
    config = copy.copy(model.peft_config["default"])
    assert isinstance(config, LoraConfig)
    modules, wrapped = ["multi_modal_projector"], (LANGUAGE_MODEL,)
    if adapts_projector(model):  # then its weights are the base's, except biases that were trained
        modules, wrapped = [], (LANGUAGE_MODEL, PROJECTOR)
        ending = ".weight" if config.bias != "none" else ""
        rest = {name: t for name, t in rest.items() if not (name.startswith(PROJECTOR) and name.endswith(ending))}
    if any(name.startswith(TOWER) for name in rest):
        modules.append("vision_tower")
        stored |= {name: tensor for name, tensor in state.items() if name.startswith(PEFT_PREFIX + TOWER)}
    others = {name: tensor for name, tensor in rest.items() if not name.startswith((TOWER, NEWLINE))}
    stored |= {_peft_name(name, wrapped): tensor for name, tensor in others.items()}
    config.inference_mode = True
    config.modules_to_save = modules or None
    config.save_pretrained(str(folder))
    tensors = {name: stored_form(tensor) for name, tensor in stored.items()}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    save_processor(folder, processing)


def save_merged(
    folder: Path, model: Trainable, processing: Processing, dtype: torch.dtype, stop_ids: Iterable[int]
) -> None:
    """Fold the adapter into the weights and write a model folder of transformers, with its processor.

    Args:
        model: Changed in place; it cannot be used afterwards.
        dtype: Float type of the weights on disk.
        stop_ids: Tokens that end an answer of the recipe's template; generation ends there by itself.

    Raises:
        UserError: merging gives weights that are not finite.
    """
    merged = (model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model).to(dtype)  # pyright: ignore
    for half in (merged.config.text_config, merged.config.vision_config):
        assert isinstance(half, PreTrainedConfig)
        half.name_or_path = ""  # a folder of this machine
    merged.generation_config.eos_token_id = sorted(set(stop_ids))
    merged.save_pretrained(folder)
    mend_config(folder)
    save_processor(folder, processing)


def stored_form(tensor: Tensor) -> Tensor:
    """The tensor as files hold it."""
    return tensor.detach().contiguous().cpu()


def _peft_name(name: str, wrapped: tuple[str, ...]) -> str:
    """peft's own name of a weight; a bias of an adapted layer, in what is `wrapped`, lies inside its wrapper."""
    if name.startswith(wrapped) and name.endswith(".bias"):
        return f"{PEFT_PREFIX}{name.removesuffix('bias')}base_layer.bias"
    return PEFT_PREFIX + name
