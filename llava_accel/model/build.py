"""Load a LLaVA, or assemble one, as the model class that transformers has for its family."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils.import_utils import is_flash_attn_2_available

from llava_accel import compat
from llava_accel.exceptions import UserError
from llava_accel.families.registry import Config, Llava
from llava_accel.model import layouts, weights
from llava_accel.model.bases import find_base, generation_settings
from llava_accel.model.memory import quantization_config
from llava_accel.model.processing import Processing
from llava_accel.model.tower import ParkedTower
from llava_accel.recipe import Recipe
from llava_accel.storage.run_weights import find_weights, is_run

_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin", "non_lora_trainables.safetensors")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, and what is known about it.

    `vocab_size` is the number of `lm_head` rows that take part in the softmax; the rows after them hold tokens that were
    added and are never predicted. `fingerprint` is that of the base on disk, whatever projector takes the place of its own.
    `notes` are lines for the console. `tower` is the vision tower if it was left on disk: then `model` does not hold one.
    """

    model: Llava
    vocab_size: int
    fingerprint: str
    notes: list[str]
    tower: ParkedTower | None


def load_model(
    recipe: Recipe,
    processing: Processing,
    *,
    dtype: torch.dtype,
    device: torch.device | None,
    leave_tower: bool = False,
    refuse: Callable[[str], None] = lambda fingerprint: None,
) -> LoadedModel:
    """Load the weights of `processing.base`.

    Args:
        dtype: Float type of the weights.
        device: Where they go, each as it is read. None leaves that to the backend, as one that shards the model demands:
            they stay on the CPU, or with 4 and 8 bits go to the current accelerator, which quantises them.
        leave_tower: Leave the vision tower's weights on disk, for a model that runs without them.
        refuse: Told the base's fingerprint before its weights are read; may raise UserError.

    Raises:
        UserError: a file is damaged, missing, or belongs to another model.
    """
    base, notes = find_base(recipe.model), list(processing.notes)
    projector = find_projector(recipe.model.projector) if recipe.model.projector else None
    is_fresh = base.layout == "parts" and projector is None
    own = weights.gather(base)
    stored = weights.with_projector(own, projector)
    weights.check(stored, base, is_fresh)
    fingerprint = weights.fingerprint(own, base)
    refuse(fingerprint)
    state = weights.to_state_dict(stored, processing.num_rows)
    if is_fresh:
        state |= weights.fresh_projector(base, recipe.run.seed)
        notes.append(f"The projector is new: random weights from seed {recipe.run.seed}.")
    if base.family.is_tiled and layouts.NEWLINE not in stored:
        state |= weights.fresh_newline(base, recipe.run.seed)
        notes.append(f"image_newline is new: random numbers from seed {recipe.run.seed}.")
    if leave_tower:
        state |= weights.tower_stand_ins(stored, dtype, device)
    model = compat.load_model(
        base.family.model_class,
        final_config(processing),
        state,
        dtype=dtype,
        device_map=weights.straight_to(device),
        quantization_config=quantization_config(recipe.model.quantization, dtype),
        attn_implementation=attention(recipe.model.attention),
    )
    assert isinstance(model, Llava)
    compat.keep_storage_format(model)
    tower = ParkedTower(model, weights.tower_part(stored)) if leave_tower else None
    if processing.num_rows > base.text.vocab_size:
        notes.append(
            f"<image> is token {processing.image_token_id}: the embeddings grew from "
            f"{base.text.vocab_size} to {processing.num_rows} rows, and the new ones are never predicted."
        )
    # peft writes this into adapter_config.json: the name that the user gave, not a folder of some cache.
    model.name_or_path = model.config.name_or_path = recipe.model.named_base
    model.generation_config = generation_config(processing)
    return LoadedModel(model, processing.vocab_size, fingerprint, notes, tower)


def final_config(processing: Processing) -> Config:
    """The config of the model in memory and of merged exports: with the image token, and the grown vocabulary.

    `scored_vocab_size` (present where it differs from the rows) tells a later run which rows enter the softmax, and
    `image_aspect_ratio` (where a model that could cut images sees squares) how an image becomes one.
    """
    family = processing.base.family
    config = family.config_class.from_dict(processing.base.config.to_dict())
    assert isinstance(config, Config)
    config.image_token_index = processing.image_token_id
    if hasattr(config, "image_seq_length"):
        config.image_seq_length = processing.tiling.tile_tokens
    if family.is_tiled:
        config.image_aspect_ratio = processing.image_aspect
    text = config.text_config
    assert isinstance(text, PreTrainedConfig)
    text.vocab_size = processing.num_rows
    if processing.vocab_size != processing.num_rows:
        config.scored_vocab_size = processing.vocab_size
    return config


def generation_config(processing: Processing) -> GenerationConfig:
    """Greedy generation that ends where the base ends, and never writes a token without a trained row.

    Sampling settings of the base are left out: some contradict each other, and then the finished model cannot be saved.
    """
    text = processing.base.text
    ids = {key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= {key: value for key, value in generation_settings(processing.base).items() if key in ids}
    ids = {key: None if value == -1 else value for key, value in ids.items()}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = processing.processor.tokenizer.pad_token_id
    return GenerationConfig(**ids, suppress_tokens=processing.added_ids)


def find_projector(name: str) -> Path:
    """The projector's file: `name` itself, or the one in that folder or run; UserError if there is none."""
    path = Path(os.path.expanduser(name))
    path = find_weights(path) if is_run(path) else path
    files = [path, *(path / file for file in _PROJECTOR_FILES)]
    for file in files:
        if file.is_file():
            return file
    raise UserError(
        f"model.projector: {name} is neither a file nor a folder with one of {', '.join(_PROJECTOR_FILES)}. Correct the path"
    )


def attention(name: str) -> str | dict[str, str]:
    """The recipe's kernel for the language model; the vision tower, whose sequences are short, takes sdpa or eager.

    Raises:
        UserError: flash_attention_2 is not installed, or flex_attention has no GPU.
    """
    if name == "flex_attention" and not torch.accelerator.is_available():
        raise UserError(
            "model.attention: flex_attention computes no gradients on a CPU. Run it on a GPU, or set "
            'model.attention = "sdpa"'
        )
    if name == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "model.attention: flash_attention_2 needs the package flash-attn and a GPU that it supports. Install it, "
            'or set model.attention = "sdpa"'
        )
    if name == "eager":
        return "eager"
    return {"text_config": "sdpa" if name == "auto" else name, "vision_config": "sdpa", "": "sdpa"}
