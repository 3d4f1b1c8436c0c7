"""Finds out what a folder of trained weights holds, and loads the model that uses them, for export and chat."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llava_accel.exceptions import UserError
from llava_accel.model.adapters import copy_whole, lora_settings, put_rest, read_rest
from llava_accel.model.build import LoadedModel, find_projector, load_model
from llava_accel.model.files import read_json, resolve_folder
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing, load_processing
from llava_accel.model.save import FACTS, other_base, step_saved, with_step
from llava_accel.model.weights import check_values
from llava_accel.recipe import Recipe, load_recipe, make_recipe
from llava_accel.runtime.devices import find_device
from llava_accel.runtime.engines import resolve_precision
from llava_accel.storage.run_weights import complete_checkpoints, find_weights, step_of

Kind = Literal["lora", "projector", "model"]
"""LoRA weights, the projector of stage 1, or all weights of a model."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A folder of weights and all that is needed to load it.

    `recipe` names the folder itself, as adapter or as base. `own` is the recipe that it was trained with, `facts` the
    content of llava_accel.json; a folder that was not written here has neither.
    """

    folder: Path
    kind: Kind
    recipe: Recipe
    own: Recipe | None
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to answer; `notes` are lines for the user.

    `replaced` holds the base's values of the parameters that were trained: see `beside.py`.
    """

    objective: Objective
    processing: Processing
    base: LoadedModel
    notes: list[str]
    replaced: Mapping[nn.Parameter, Tensor]


def find_trained(path: str = "", *, base: str = "", template: str = "", bits: int = 0) -> Trained:
    """Find the weights of a run, a checkpoint, an export or another adapter, or of a base alone.

    Args:
        path: A folder or a hub id; empty for the base alone.
        base: Folder or hub id of the base, in place of the one in the folder's recipe. Adapters made elsewhere need it.
        template: Conversation template, in place of the recipe's; without both it is "v1".
        bits: 4, 8 or 16 in place of the recipe's quantisation; 0 leaves it.

    Raises:
        UserError: there is no such template, the folder holds no weights, or it does not say what it was trained on.
    """
    if template:  # one of its names, and refused before anything is read
        template = _recipe_of({"base": "none", "template": template}, "--template").model.template
    name, what = (path, "run, checkpoint, export or base") if path else (base, "--base")
    folder = _folder(name, what)
    kind = _kind(folder)
    if path and base and kind == "model":
        raise UserError(f"--base {base}: {folder} is a whole model, which needs no base. Leave --base out")
    own = load_recipe(folder / "recipe.toml", warns=False) if (folder / "recipe.toml").is_file() else None
    model = {} if own else _settings(folder, kind, base)
    recipe = own or _recipe_of(model, "recipe")
    changes: dict[str, object] = {"projector": ""}  # every folder holds the projector that belongs to it
    if recipe.model.attention != "eager":  # the others are for training: answers use sdpa, which every machine has
        changes["attention"] = "auto"
    if kind == "model":
        place = str(folder) if Path(name).is_dir() else name
        changes |= {"base": place, "language_model": "", "vision_tower": "", "adapter": ""}
    else:
        changes["adapter"] = str(folder) if kind == "lora" else ""
        if base:
            changes |= {"base": base, "language_model": ""}
            changes |= {"vision_tower": ""} if recipe.model.language_model else {}  # a part then; else an override
    if kind == "lora" and recipe.model.lora.projector:  # an export for LLaVA has folded its LoRA layers into it
        projector = lora_settings(folder)["projector"]
        changes["lora"] = recipe.model.lora.model_copy(update={"projector": projector})
    changes |= {"template": template} if template else {}
    recipe = with_bits(recipe, bits or (16 if kind == "model" else recipe.model.quantization.bits))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
    facts = read_json(folder / FACTS) if (folder / FACTS).is_file() else {}
    return Trained(folder, kind, recipe, own, facts)


def describe(trained: Trained) -> str:
    """A line that says which weights these are: folder and step, and for a run whether they are its best or its last."""
    folder, own = trained.folder, trained.own
    if own is None:
        base = trained.recipe.model.base or str(folder)
        return f"weights: {base}" if trained.kind == "model" else f"weights: {folder}, on {base}"
    said = [f"run {own.run.name}"]
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    last = max(map(step_of, complete_checkpoints(run / "checkpoints")), default=None)
    is_last = last is None or last == step_saved(folder)
    if folder.name == "best":
        said.append(f"the best by {own.eval.metric}{' and the last' if last is not None and is_last else ''}")
    elif folder.parent.name == "checkpoints":
        said.append("its last checkpoint" if is_last else "an earlier checkpoint")
    said += [] if is_last else [f"the last is step {last:,}"]
    return f"weights: {with_step(folder)} ({', '.join(said)})"


def with_trained(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the weights of a run, a checkpoint, an export or another folder, in place of those it starts from.

    Raises:
        UserError: nothing in it can be loaded, or it does not go with the recipe.
    """
    folder = _folder(name, "--adapter")
    tables, kind = recipe.model_dump(), _kind(folder)
    model = tables["model"]
    if kind == "lora":
        settings = lora_settings(folder)
        model |= {"adapter": str(folder), "train": "lora", "lora": model["lora"] | settings | {"targets": "auto"}}
        model["train_projector"] &= not settings["projector"]
    elif kind == "projector":
        model |= {"projector": str(folder), "adapter": ""}
    else:
        of_parts = {"language_model": "", "vision_tower": "", "family": "llava"}
        model |= {"base": str(folder), "projector": "", "adapter": "", **of_parts}
    return make_recipe(tables, name)


def with_bits(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with another quantisation of the base."""
    quantization = recipe.model.quantization.model_copy(update={"bits": bits})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": quantization})})


def load_here(trained: Trained, *, keep_base: bool = False) -> Loaded:
    """`load_trained` on this machine's device, in the precision of its recipe."""
    device = find_device()
    dtype = resolve_precision(trained.recipe.run.precision, device)
    return load_trained(trained, dtype=dtype, device=device, keep_base=keep_base)


def load_trained(trained: Trained, *, dtype: torch.dtype, device: torch.device, keep_base: bool = False) -> Loaded:
    """The trained model in evaluation mode.

    Args:
        keep_base: Also keep the base's values of trained weights, in `replaced`.

    Raises:
        UserError: base or trained weights are damaged, missing, or do not belong together.
    """
    recipe = trained.recipe
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    base = load_model(recipe, processing, dtype=dtype, device=device)
    replaced: dict[nn.Parameter, Tensor] = {}

    def put(parameter: nn.Parameter, value: Tensor) -> None:
        replaced.setdefault(parameter, parameter.detach().clone())
        parameter.copy_(value)

    chosen = put if keep_base else copy_whole
    model = base.model if trained.kind == "model" else prepare_trainable(base.model, recipe, chosen)
    if trained.kind == "projector":
        file = find_projector(str(trained.folder))
        put_rest(model, read_rest(file), str(file), chosen)
    check_values(model, str(trained.folder))
    objective = Objective(model, base.vocab_size).to(device).eval()
    return Loaded(objective, processing, base, notes_on_base(trained, base.fingerprint), replaced)


def notes_on_base(trained: Trained, fingerprint: str) -> list[str]:
    """A note for the user if the base is not the one that the weights were trained on; else none."""
    base = trained.recipe.model.named_base
    note = other_base(trained.folder, base, fingerprint) if trained.kind != "model" else ""
    return [note] if note else []


def _recipe_of(model: Mapping[str, object], source: str) -> Recipe:
    return make_recipe({"run": {"name": "run"}, "model": model, "data": {"train": "none"}}, source)


def _folder(name: str, what: str) -> Path:
    return find_weights(Path(name)) if Path(name).is_dir() else resolve_folder(name, what)


def _kind(folder: Path) -> Kind:
    if (folder / "adapter_config.json").is_file():
        return "lora"
    if any(next(folder.glob(pattern), None) for pattern in ("model*.safetensors", "pytorch_model*.bin")):
        return "model"
    try:
        find_projector(str(folder))
    except UserError:
        raise UserError(f"{folder} holds no weights. Name a run (runs/NAME), a checkpoint or an export") from None
    return "projector"


def _settings(folder: Path, kind: Kind, base: str) -> dict[str, object]:
    """[model] of a recipe for a folder that has none."""
    if kind == "model":
        return {"base": str(folder)}
    if not base:
        raise UserError(f"{folder} has no recipe.toml, so it does not say what it was trained on. Name it in --base")
    if kind == "projector":
        return {"base": base, "train": "projector"}
    return {"base": base, "train": "lora", "lora": lora_settings(folder)}
