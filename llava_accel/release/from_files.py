"""Reads trained weights from their files: exports that only rename them need no other weights of the base than their own.

The model is on the meta device, so names, shapes and settings are those of the loaded one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from llava_accel.families.registry import Llava
from llava_accel.inference.origin import Trained, notes_on_base
from llava_accel.model import layouts, weights
from llava_accel.model.adapters import Adapter, check_kept, load_adapter, put_rest, read_adapter, read_rest
from llava_accel.model.bases import empty_model, find_base
from llava_accel.model.build import final_config, find_projector
from llava_accel.model.lora import (
    FROM_WEIGHTS,
    Trainable,
    language_model_linears,
    prepare_trainable,
    without_starting_values,
)
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe


@dataclass(frozen=True, slots=True)
class FromFiles:
    """A trained model. `state` has the model's own names; a weight that is only the base's is on the meta device. `notes`
    are lines for the user, `stored` is the base on disk."""

    model: Trainable
    processing: Processing
    state: Mapping[str, Tensor]
    stored: weights.Stored
    fingerprint: str
    notes: list[str]

    def tower(self) -> dict[str, Tensor]:
        """All weights of the vision tower, by its own names: the trained ones if there are any, else the base's."""
        trained = {layouts.without_peft(name): tensor for name, tensor in self.state.items() if not tensor.is_meta}
        return {
            name: trained[layouts.TOWER + name] if layouts.TOWER + name in trained else tensor.read()
            for name, tensor in weights.tower_part(self.stored).items()
        }


def read_trained(trained: Trained, recipe: Recipe) -> FromFiles:
    """Read an adapter, a projector or a whole model without loading a base.

    Args:
        recipe: The recipe that loads it on a base of 16 bits.

    Raises:
        UserError: base or trained weights are damaged, missing, or do not belong together.
    """
    base, processing = find_base(recipe.model), load_processing(recipe.model, recipe.data.image_aspect)
    stored = weights.gather(base)
    weights.check(stored, base, base.layout == "parts")
    fingerprint = weights.fingerprint(stored, base)
    values: dict[int, Tensor] = {}

    def keep(parameter: nn.Parameter, value: Tensor) -> None:
        values[id(parameter)] = value
        parameter.requires_grad_(True)  # whatever the recipe says: it was trained

    model: Trainable = empty_model(base, final_config(processing)).requires_grad_(False)
    if trained.kind == "lora":
        # Read here: what is read in the scope of the meta device has no values.
        adapter = read_adapter(str(trained.folder), recipe.model.lora)
        check_kept(recipe.model, "Use --to merged")
        model = _adapted(model, adapter, recipe)
        load_adapter(model, adapter, keep)
    if trained.kind == "projector":
        put_rest(model, read_rest(find_projector(str(trained.folder))), str(trained.folder), keep)
    parameters = {layouts.without_peft(name): parameter for name, parameter in model.named_parameters()}
    trains_tower = any(name.startswith(layouts.TOWER) and p.requires_grad for name, p in parameters.items())
    parts = (*layouts.CONNECTION, *([layouts.TOWER] if trains_tower else []))
    for name, parameter in parameters.items():
        is_needed = trained.kind == "model" or name.startswith(parts)
        if is_needed and id(parameter) not in values and name in stored:
            values[id(parameter)] = stored[name].read()
    state = {name: values.get(id(parameter), parameter) for name, parameter in model.named_parameters()}
    return FromFiles(model, processing, state, stored, fingerprint, notes_on_base(trained, fingerprint))


def _adapted(model: Llava, adapter: Adapter, recipe: Recipe) -> PeftModel:
    """The model with LoRA layers where the adapter has them, and with its settings."""
    table = without_starting_values(recipe.model)
    chosen = tuple(map(re.escape, adapter.choose(language_model_linears(model))))
    table = table.model_copy(update={"adapter": "", "lora": table.lora.model_copy(update={"targets": chosen})})
    with torch.device("meta"):
        prepared = prepare_trainable(model, recipe.model_copy(update={"model": table}))
    assert isinstance(prepared, PeftModel)
    if recipe.model.lora.variant in FROM_WEIGHTS:
        prepared.peft_config["default"].init_lora_weights = recipe.model.lora.variant  # pyright: ignore
    return prepared
