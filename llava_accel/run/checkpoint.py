"""Checkpoints: complete or not there at all, enough to resume from and to use as they are.

A folder `checkpoints/step-000100` holds the usable weights (`model/save.py`) and, under `engine/`, moments and position
(`run/progress.py`). It is written beside its place, flushed, listed with hashes in `manifest.json`, and then renamed.
Tensors are gathered by all ranks, one at a time, and written by the main process alone.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import nn

from llava_accel.model.build import LoadedModel
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.model.save import is_saved, save_model
from llava_accel.recipe import Recipe, dump_recipe
from llava_accel.run.backend import gathered_moments, gathered_weights, put_moments
from llava_accel.run.card import describe
from llava_accel.run.console import Screen
from llava_accel.run.progress import advance, read_moments, read_position, write_moments, write_position
from llava_accel.run.sealed import MANIFEST, complete_checkpoints, is_complete, seal, step_of
from llava_accel.run.state import TrainState


class Checkpoints:
    """The checkpoints of one run.

    Args:
        model: The prepared objective; its trainable weights are what is saved.
        loaded: What was loaded, for names, processor and fingerprint.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        scheduler: AcceleratedScheduler,
        loaded: LoadedModel,
        processing: Processing,
        state: TrainState,
        screen: Screen,
    ) -> None:
        self._recipe, self._accelerator, self._screen = recipe, accelerator, screen
        self._model, self._optimizer, self._scheduler = model, optimizer, scheduler
        self._loaded, self._processing, self._state = loaded, processing, state
        self._run = Path(recipe.run.output_dir)
        self._folder = self._run / "checkpoints"
        self._saved_step = -1

    def save(self, enter: Callable[[str], None]) -> None:
        """Write a checkpoint of this step unless there is one. Every rank must call it.

        Args:
            enter: Told the phase that begins (`run/timing.py`).
        """
        if self._saved_step == self._state.step:
            return
        enter("saving")
        target = self._folder / f"step-{self._state.step:06d}"
        unfinished = target.with_name(f"{target.name}.tmp")
        if self._accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self._accelerator.wait_for_everyone()
        self._save_progress(unfinished / "engine")
        self.export(unfinished)
        self._accelerator.wait_for_everyone()
        if self._accelerator.is_main_process:
            seal(unfinished)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(unfinished, target)
            self._rotate()
        self._saved_step = self._state.step
        self._accelerator.wait_for_everyone()
        enter("other")

    def export(self, folder: Path) -> None:
        """Write what inference needs: weights, processor, template, recipe. Every rank must call it."""
        objective = self._accelerator.unwrap_model(self._model)
        assert isinstance(objective, Objective)
        keep = is_saved(objective, self._recipe)
        weights = dict(gathered_weights(self._accelerator, self._model, keep))
        if self._accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            save_model(folder, objective, weights, self._loaded, self._processing, self._recipe)
            (folder / "recipe.toml").write_text(dump_recipe(self._recipe))
            describe(folder, self._run, self._recipe, self._state.step)

    def keep_best(self) -> None:
        """Make `best/` a copy of the newest checkpoint without its engine folder, replaced in one rename."""
        if not self._accelerator.is_main_process:
            return
        source, target = self._folder / f"step-{self._state.step:06d}", self._run / "best"
        unfinished = self._run / "best.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("engine", MANIFEST))
        seal(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)

    def resume(self, source: Path | None) -> None:
        """Go on from a checkpoint whose weights the model was built with; None starts anew.

        Written by another engine or another number of ranks it serves as well, if a step is the same portion of data.

        Raises:
            ValueError: its steps are others, or its moments are of another optimizer or of other weights.
        """
        if source is None:
            self._remove_later()
            return
        read_position(source / "engine", self._recipe, self._accelerator, self._state)
        self._remove_later()
        put_moments(self._accelerator, self._model, self._optimizer, read_moments(source / "engine"))
        advance(self._scheduler, self._state.step)
        self._saved_step = self._state.step
        self._screen.line(f"resumed from {source} at step {self._state.step} of {self._state.num_steps}")

    def _save_progress(self, folder: Path) -> None:
        moments = gathered_moments(self._accelerator, self._model, self._optimizer)
        if not self._accelerator.is_main_process:
            for _ in moments:  # every rank takes part in the gathering
                pass
            return
        folder.mkdir()
        write_moments(folder, moments)
        write_position(folder, self._recipe, self._accelerator, self._state)

    def _remove_later(self) -> None:
        """Remove what the folder holds of steps that are taken anew: nothing may resume from it or count it."""
        if not self._accelerator.is_main_process:
            return
        later = [folder for folder in complete_checkpoints(self._folder) if step_of(folder) > self._state.step]
        leftovers = [self._run / "best", self._run / "export"] if self._state.step == 0 else []
        for folder in [*later, *leftovers, *self._folder.glob("step-*.tmp")]:
            shutil.rmtree(folder, ignore_errors=True)
        if later:
            self._screen.line(f"removed {len(later)} checkpoints of an earlier run behind step {self._state.step}")

    def _rotate(self) -> None:
        complete = complete_checkpoints(self._folder)
        for folder in complete[: -self._recipe.checkpoint.keep]:
            shutil.rmtree(folder)


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint to resume from: "auto" takes the run's newest complete one, "never" none.

    Raises:
        ValueError: run.resume names a folder that is no complete checkpoint, or the run has none but damaged ones.
    """
    resume, folder = recipe.run.resume, Path(recipe.run.output_dir) / "checkpoints"
    if resume == "never":
        return None
    if resume == "auto":
        found = complete_checkpoints(folder)
        intact = next((checkpoint for checkpoint in reversed(found) if is_complete(checkpoint)), None)
        if found and intact is None:
            raise ValueError(
                f"run.resume: every checkpoint in {folder} is damaged (a file differs from its {MANIFEST}). "
                'Put one back, or set run.resume = "never" to start anew'
            )
        return intact
    source = Path(resume)
    if not is_complete(source):
        raise ValueError(
            f"run.resume: {source} is no complete checkpoint (no {MANIFEST}, or a file differs from it). "
            'Name a folder runs/NAME/checkpoints/step-N, or use "auto"'
        )
    return source
