"""Builds the module that a recipe trains, and prints how many of its weights are trained and in which types."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from llava_accel import compat
from llava_accel.kernels.compiled import compile_layers, keep_flex_compiled
from llava_accel.kernels.liger import liger_problem, require_liger_decoder, use_liger
from llava_accel.model.adapters import check_kept, has_tower
from llava_accel.model.build import LoadedModel, load_model
from llava_accel.model.files import resolve_folder
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.memory import enable_checkpointing, lighten_dropout
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.model.save import load_saved, other_base, refuse_other_base, step_saved, with_step
from llava_accel.model.task import new_objective
from llava_accel.model.tower import ParkedTower
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import load_device, place, resolve_precision
from llava_accel.setup.products import choose_matmul
from llava_accel.setup.vision_cache import may_cache, may_park, name_tower
from llava_accel.storage.kept_files import cache_folder

_PARTS = ("LoRA", "projector", "vision tower", "language model")


def build_objective(
    run: RunContext, processing: Processing, source: Path | None = None, *, saves: bool = False
) -> tuple[Objective, LoadedModel]:
    """Load the base, make it trainable as the recipe says, and print what is trained and in which types.

    Args:
        source: A checkpoint of this run, whose weights take the place of what the recipe starts from.
        saves: Whether checkpoints follow, which must hold all that the recipe's adapter holds.

    Raises:
        UserError: base, adapter or LoRA settings cannot be used.
    """
    recipe, accelerator, console = run.recipe, run.accelerator, run.console
    if not console.is_terminal:
        disable_progress_bar()  # of transformers while it loads: it would fill a log file with one line of fragments
    if saves:
        check_kept(recipe.model)
    dtype = resolve_precision(recipe.run.precision, accelerator.device)
    # A run that was trained with liger can be evaluated on a CPU, without it.
    wants_liger = recipe.model.kernels == "liger" and not liger_problem(accelerator.device)
    if wants_liger:
        require_liger_decoder(processing.base.text)
    may_leave = may_park(recipe) and not (recipe.model.adapter and has_tower(recipe.model.adapter))
    loaded = load_model(
        recipe,
        processing,
        dtype=dtype,
        device=load_device(accelerator),
        leave_tower=may_leave,
        refuse=partial(refuse_other_base, source, recipe.model.named_base),
    )
    torch.manual_seed(recipe.run.seed)  # new LoRA weights: the same on every rank, and on any number of them
    model = prepare_trainable(loaded.model, recipe)
    for note in (*loaded.notes, *_origins(recipe, loaded.fingerprint)):
        console.line(note)
    choose_matmul(run, loaded.model.config.get_text_config().hidden_size, source)
    enable_checkpointing(loaded.model, recipe.model.gradient_checkpointing)
    lighten_dropout(model)
    summary = trainable_summary(model, loaded.tower.module if loaded.tower else None)
    console.pairs("weights", describe_weights(summary))
    objective = new_objective(recipe, model, loaded.vocab_size, dtype)
    if wants_liger:
        use_liger(objective.llava.model.language_model)
    if recipe.model.compile:
        compile_layers(objective.llava.model.language_model)
    if recipe.model.attention == "flex_attention":
        keep_flex_compiled()
    if source:
        load_saved(source, objective)
    if may_park(recipe):
        objective.parked = loaded.tower or ParkedTower(loaded.model)
    if may_cache(recipe):
        objective.tower_name = name_tower(objective, cache_folder(recipe.data.cache_dir), accelerator)
    return place(objective, accelerator), loaded


def _origins(recipe: Recipe, fingerprint: str) -> list[str]:
    """A line for each key that names a result of training here, with its step; and a warning for each adapter or projector
    that was trained on another base than the one with this fingerprint."""
    table = recipe.model
    named = {"base": table.base, "projector": table.projector, "adapter": table.adapter}
    folders = {key: resolve_folder(name, f"model.{key}") for key, name in named.items() if Path(name).is_dir() and name}
    said = [f"model.{key}: {with_step(folder)}" for key, folder in folders.items() if step_saved(folder) is not None]
    added = [folder for key, folder in folders.items() if key != "base"]
    return said + [note for folder in added if (note := other_base(folder, table.named_base, fingerprint))]


def describe_weights(summary: "TrainableSummary") -> dict[str, str]:
    """How many weights of each part are trained, and the memory that all weights take, for the console."""
    trained = [
        f"{row.part} {row.trainable:,}{f' of {row.total:,}' if row.trainable < row.total else ''}"
        for row in summary.parts
        if row.trainable
    ]
    frozen = [f"{row.part} {row.total:,}" for row in summary.parts if not row.trainable]
    share = f"{100 * sum(row.share for row in summary.parts):.2f} % of all"
    types = [f"{row.parameters:,} in {row.dtype}, {row.bytes / 2**20:,.1f} MiB" for row in summary.types]
    facts = {"trained": f"{', '.join(trained)}: {share}", "frozen": ", ".join(frozen), "in memory": "; ".join(types)}
    return {name: text for name, text in facts.items() if text}


class PartRow(NamedTuple):
    """Weights of one part. `share` is the trained part of all weights of the model, from 0 to 1."""

    part: str
    trainable: int
    total: int
    share: float


class TypeRow(NamedTuple):
    """Weights kept in one type, and the bytes that they take; packed 4-bit weights are counted one by one."""

    dtype: str
    parameters: int
    bytes: int


class TrainableSummary(NamedTuple):
    """Rows for the console."""

    parts: list[PartRow]
    types: list[TypeRow]


def trainable_summary(model: nn.Module, tower: nn.Module | None = None) -> TrainableSummary:
    """Count the weights of a model before the backend shards it.

    Args:
        tower: A vision tower that is not in the model; on the meta device it takes no memory.
    """
    trained: Counter[str] = Counter()
    total: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    size: Counter[str] = Counter()
    apart = tower.named_parameters(prefix="vision_tower") if tower else ()
    for name, parameter in (*model.named_parameters(), *apart):
        (kind, count), part = _type_and_count(parameter), _part_of(name)
        total[part] += count
        trained[part] += count if parameter.requires_grad else 0
        if parameter.is_meta:
            continue
        weights[kind] += count
        size[kind] += parameter.numel() * parameter.element_size()
    everything = sum(total.values())
    return TrainableSummary(
        [PartRow(part, trained[part], total[part], trained[part] / everything) for part in _PARTS if total[part]],
        [TypeRow(kind, weights[kind], size[kind]) for kind in sorted(weights)],
    )


def _type_and_count(parameter: nn.Parameter) -> tuple[str, int]:
    """`nf4`, `fp4`, or the tensor's type; and its number of weights: an element of 4-bit weights holds several."""
    return compat.packed_weights(parameter) or (str(parameter.dtype).removeprefix("torch."), parameter.numel())


def _part_of(name: str) -> str:
    if ".lora_" in name:
        return "LoRA"
    if "multi_modal_projector" in name:
        return "projector"
    return "vision tower" if "vision_tower" in name else "language model"
