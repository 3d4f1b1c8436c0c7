"""From a recipe to the module that is trained, with what the user should know of it printed once."""

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.utils.logging import disable_progress_bar

from llava_accel.data.loader import cache_folder
from llava_accel.model.adapters import has_tower
from llava_accel.model.build import LoadedModel, load_model
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.memory import enable_checkpointing, lighten_dropout
from llava_accel.model.objective import Objective
from llava_accel.model.parked_tower import ParkedTower
from llava_accel.model.processing import Processing
from llava_accel.model.save import load_saved
from llava_accel.model.summary import trainable_summary
from llava_accel.recipe import Recipe
from llava_accel.run.backend import load_device, place, resolve_precision
from llava_accel.run.console import Screen
from llava_accel.run.features import may_cache, may_park
from llava_accel.run.tower_name import name_tower


def build_objective(
    recipe: Recipe, processing: Processing, accelerator: Accelerator, screen: Screen, source: Path | None = None
) -> tuple[Objective, LoadedModel]:
    """Load the base, make it trainable as the recipe says, and print what is trained and in which types.

    Args:
        source: A checkpoint of this run, whose weights take the place of what the recipe starts from.

    Raises:
        ValueError: base, adapter or LoRA settings cannot be used.
    """
    if not screen.console.is_terminal:
        disable_progress_bar()  # of transformers while it loads: it would fill a log file with one line of fragments
    dtype = resolve_precision(recipe.run.precision, accelerator.device)
    may_leave = may_park(recipe) and not (recipe.model.adapter and has_tower(recipe.model.adapter))
    loaded = load_model(recipe, processing, dtype=dtype, device=load_device(accelerator), leave_tower=may_leave)
    torch.manual_seed(recipe.run.seed)  # new LoRA weights: the same on every rank, and on any number of them
    model = prepare_trainable(loaded.model, recipe)
    for note in loaded.notes:
        screen.line(note)
    enable_checkpointing(loaded.model, recipe.model.gradient_checkpointing)
    lighten_dropout(model)
    summary = trainable_summary(model, loaded.tower.module if loaded.tower else None)
    screen.table(
        "trained",
        ["part", "trained", "of", "share of the model"],
        [[row.part, f"{row.trainable:,}", f"{row.total:,}", f"{row.share:.2%}"] for row in summary.parts],
    )
    screen.table(
        "in memory",
        ["type", "weights", "MiB"],
        [[row.dtype, f"{row.parameters:,}", f"{row.bytes / 2**20:,.1f}"] for row in summary.types],
    )
    objective = Objective(model, loaded.vocab_size, tower_on_every_rank=recipe.model.train_vision)
    if source:
        load_saved(source, objective)
    if may_park(recipe):
        objective.parked = loaded.tower or ParkedTower(loaded.model)
    if may_cache(recipe):
        objective.tower_name = name_tower(objective, cache_folder(recipe.data.cache_dir), accelerator)
    return place(objective, accelerator), loaded
