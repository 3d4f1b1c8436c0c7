"""Finds problems of the model and the run folder that a recipe names, without building or loading a model.

Every part is checked even if others are wrong, so that the user learns of all problems at once.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from llava_accel.checkpoint.progress import check_position
from llava_accel.checkpoint.resume import find_checkpoint
from llava_accel.console.output import Console
from llava_accel.exceptions import UserError
from llava_accel.loop.machine import check_machine
from llava_accel.model import weights
from llava_accel.model.adapters import check_kept, read_adapter
from llava_accel.model.bases import Base, empty_model, find_base
from llava_accel.model.build import final_config, find_projector
from llava_accel.model.files import StoredTensor
from llava_accel.model.lora import prepare_trainable, without_starting_values
from llava_accel.model.processing import Processing, load_processing
from llava_accel.model.save import refuse_other_base
from llava_accel.recipe import Recipe
from llava_accel.runtime.devices import find_device
from llava_accel.runtime.launch_profile import read_profile
from llava_accel.setup.datasets import Part, build_order, content_here
from llava_accel.setup.run_folder import check_folder
from llava_accel.setup.state import TrainState

_MANY = 200  # tensors; a model with more takes more than a moment to read

Result = TypeVar("Result")


class Problems:
    """Collects the messages of what fails, so that one failure does not hide the next."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """The action's result; None if it raised a UserError, whose message is then kept."""
        try:
            return action()
        except UserError as error:
            if str(error) not in self.messages:
                self.messages.append(str(error))
            return None


def examine_model(recipe: Recipe, console: Console, source: Path | None = None) -> tuple[Processing | None, list[str]]:
    """Check configs, tokenizer, image processor, names, shapes and values of all weights, and the adapter.

    Weights are checked if the recipe names folders; for a model of the hub only its configs are downloaded.

    Args:
        source: The checkpoint that the run resumes from.

    Returns:
        The processing, None if it cannot be loaded; and the messages, empty if the model can be used.
    """
    problems = Problems()
    base = problems.attempt(lambda: find_base(recipe.model, weights=False))
    if base is None:
        return None, problems.messages
    processing = problems.attempt(lambda: load_processing(recipe.model, recipe.data.image_aspect))
    for note in processing.notes if processing else ():
        console.line(note)
    names = (recipe.model.base, recipe.model.language_model, recipe.model.vision_tower)
    if all(os.path.isdir(os.path.expanduser(name)) for name in names if name):
        own, stored = problems.attempt(lambda: _gather(recipe, base)) or ({}, {})
        if len(stored) > _MANY:
            console.line("reading weights")
        for tensor in stored.values():
            problems.attempt(tensor.read_finite)
        if source and stored:
            name, fingerprint = recipe.model.named_base, weights.fingerprint(own, base)
            problems.attempt(lambda: refuse_other_base(source, name, fingerprint))
    if processing is not None:
        problems.attempt(lambda: _check_trainable(recipe, processing))
    elif recipe.model.adapter:
        problems.attempt(lambda: read_adapter(recipe.model.adapter, recipe.model.lora))
    return processing, problems.messages


def examine_run(recipe: Recipe, console: Console) -> tuple[Path | None, list[str]]:
    """Check that this machine has what the run needs, that its folder can be written, and a run in it resumed.

    Returns:
        The checkpoint that the run resumes from, None for a new run; and the messages.
    """
    problems, source = Problems(), None
    problems.attempt(lambda: check_folder(Path(recipe.run.output_dir)))
    if not problems.messages:
        source = problems.attempt(lambda: find_checkpoint(recipe, console.line))
    problems.attempt(lambda: check_machine(recipe, find_device(wants_cpu=read_profile().wants_cpu)))
    return source, problems.messages


def examine_position(recipe: Recipe, source: Path, part: Part) -> None:
    """UserError if a checkpoint's steps are not those of this recipe on these data, with as many ranks as wrote it."""
    data = TrainState.of(recipe.train, build_order(recipe, part, 1), content_here(recipe, part)).data
    check_position(source / "engine", recipe, find_device(wants_cpu=read_profile().wants_cpu), data)


def missing_trackers(names: Sequence[str]) -> list[str]:
    """Lines on trackers that are not installed: a run goes on without them."""
    packages = {name: (name, "tensorboardX") if name == "tensorboard" else (name,) for name in names}
    missing = [name for name, either in packages.items() if not any(map(importlib.util.find_spec, either))]
    if not missing:
        return []
    listed = ", ".join(missing)
    return [f"log.trackers: not installed, so not used: {listed}. Run: pip install {' '.join(missing)}"]


def _gather(recipe: Recipe, base: Base) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors of the base itself, and those that training starts from."""
    projector = find_projector(recipe.model.projector) if recipe.model.projector else None
    own = weights.gather(base)
    stored = weights.with_projector(own, projector)
    weights.check(stored, base, base.layout == "parts" and projector is None)
    return own, stored


def _check_trainable(recipe: Recipe, processing: Processing) -> None:
    """Put LoRA layers and adapter into a model without values; UserError if targets match nothing, or the adapter is
    damaged or of another base."""
    table = recipe.model
    if table.adapter:
        read_adapter(table.adapter, table.lora)
        check_kept(table)
    plain = without_starting_values(table)
    if plain is not table:  # an adapter of another variant would be refused
        table = plain.model_copy(update={"adapter": ""})
    model = empty_model(processing.base, final_config(processing))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is a no-op")  # true, but only names and shapes count here
        prepare_trainable(model, recipe.model_copy(update={"model": table}))
