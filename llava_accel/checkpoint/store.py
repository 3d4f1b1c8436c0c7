"""Checkpoints: complete or not there at all, enough to resume from and to use as they are.

A folder `checkpoints/step-000100` holds the usable weights (`model/save.py`) and, under `engine/`, moments and position
(`progress.py`). It is written beside its place, flushed, listed with hashes in `manifest.json`, read back, and then
renamed. Tensors are gathered by all ranks, one at a time, and written by the main process alone.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import Tensor

from llava_accel.checkpoint import progress
from llava_accel.checkpoint.model_card import describe
from llava_accel.exceptions import UserError
from llava_accel.model.build import LoadedModel
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.model.save import is_saved, load_saved, save_model, step_saved
from llava_accel.recipe import dump_recipe
from llava_accel.runtime.context import Prepared, RunContext
from llava_accel.runtime.engines import (
    gathered_optimizer_state,
    gathered_weights,
    load_optimizer_state,
    weight_setter,
)
from llava_accel.setup.state import TrainState
from llava_accel.storage.atomic import (
    MANIFEST,
    beside,
    commit,
    flush,
    is_complete,
    is_of_the_disk,
    is_ours,
    recover,
)
from llava_accel.storage.run_weights import complete_checkpoints, step_of


class Checkpoints:
    """The checkpoints of one run.

    Args:
        prepared: Its trainable weights and the optimizer's state are what is saved.
        loaded: What was loaded, for names, processor and fingerprint.
    """

    def __init__(
        self, run: RunContext, prepared: Prepared, loaded: LoadedModel, processing: Processing, state: TrainState
    ) -> None:
        self._recipe, self._accelerator, self._console = run.recipe, run.accelerator, run.console
        self._model, self._optimizer, self._scheduler = prepared.model, prepared.optimizer, prepared.scheduler
        self._loaded, self.processing, self._state = loaded, processing, state
        self._run = Path(run.recipe.run.output_dir)
        self._folder = self._run / "checkpoints"
        self._saved_step = self._failed_step = -1

    def save(self, enter: Callable[[str], None]) -> bool:
        """Write a checkpoint of this step unless there is one. Every rank must call it.

        Args:
            enter: Told the phase that begins (`runtime/timing.py`).

        Returns:
            Whether there is one now. Where the disk is full or the folder cannot be written, the reason is printed, and
            the run and its older checkpoints stay as they are.
        """
        if self._state.step in (self._saved_step, self._failed_step):
            return self._saved_step == self._state.step
        enter("saving")
        target = self._folder / f"step-{self._state.step:06d}"
        with self._failing_softly(target) as problem:
            sums = self._accelerator.gather(self._state.unlogged[None])
            assert isinstance(sums, Tensor)
            weights = self._gathered()
            states = gathered_optimizer_state(self._accelerator, self._model, self._optimizer)
            with progress.all_taken(states) as moments:
                if self._accelerator.is_main_process:
                    unfinished = beside(target)
                    (unfinished / "engine").mkdir()
                    progress.write_optimizer_state(unfinished / "engine", moments)
                    progress.write_position(unfinished / "engine", self._recipe, self._accelerator, self._state, sums)
                    self._write(unfinished, weights, self._state.step)
                    for lines in self._run.glob("*.jsonl"):  # a resumed run takes them for written
                        flush(lines)
                    commit(unfinished, target)
                    self._rotate()
        enter("other")
        if problem:
            self._console.line(
                f"checkpoint: {target} could not be written ({problem[0]}). The run goes on with the checkpoints that it "
                "has and tries again at the next interval; make room there, or make the folder writable"
            )
            self._failed_step = self._state.step
            return False
        self._saved_step = self._state.step
        return True

    def take_best(self) -> int:
        """Put the weights of `best/` into the model, where the run keeps one. Every rank must call it.

        For the end of a run: what it exports, verifies and shows is then what every verb loads.

        Returns:
            The step whose weights the model holds now.
        """
        best = self._run / "best"
        there = self._accelerator.is_main_process and self._recipe.checkpoint.best and is_complete(best)
        step = broadcast_object_list([step_saved(best) if there else None])[0]
        if step is not None and step != self._state.step:
            load_saved(best, self._objective(), weight_setter(self._accelerator))
        return self._state.step if step is None else step

    def export(self, folder: Path, step: int) -> None:
        """Write what inference needs: weights, processor, template, recipe. Every rank must call it.

        Args:
            step: That of the weights that the model holds.

        Raises:
            UserError: the folder cannot be written.
        """
        with self._failing_softly(folder) as problem:
            weights = self._gathered()
            if self._accelerator.is_main_process:
                unfinished = beside(folder)
                self._write(unfinished, weights, step)
                commit(unfinished, folder)
        if problem:
            raise UserError(
                f"{folder} could not be written ({problem[0]}). Make room there, or make the folder writable, and repeat "
                "the command: it goes on from the last checkpoint"
            )

    def keep_best(self) -> None:
        """Make `best/` a copy of the newest checkpoint without its engine folder, and write its score into it."""
        source, target = self._folder / f"step-{self._state.step:06d}", self._run / "best"
        with self._failing_softly(target) as problem:
            if self._accelerator.is_main_process:
                unfinished = beside(target)
                left_out = shutil.ignore_patterns("engine", MANIFEST)
                shutil.copytree(source, unfinished, ignore=left_out, dirs_exist_ok=True)
                describe(unfinished, self._run, self._recipe, self._state.step)
                commit(unfinished, target)
        if problem:
            self._console.line(f"checkpoint: {target} could not be written ({problem[0]}) and stays what it was")

    def resume(self, source: Path | None) -> None:
        """Go on from a checkpoint whose weights the model was built with; None starts from the beginning.

        Written by another engine or another number of ranks it serves as well, if a step is the same portion of data.

        Raises:
            UserError: its steps are others, or its moments are of another optimizer or of other weights.
        """
        if source is None:
            self._remove_later()
            return
        progress.read_position(source / "engine", self._recipe, self._accelerator, self._state)
        self._remove_later()
        moments = progress.read_optimizer_state(source / "engine")
        load_optimizer_state(self._accelerator, self._model, self._optimizer, moments)
        progress.advance(self._scheduler, self._state.step)
        if source.resolve().parent == self._folder.resolve():
            self._saved_step = self._state.step
        else:  # of another run, whose best is not here
            self._state.best, self._state.best_step, self._state.evaluations_without_gain = None, 0, 0
        self._console.line(f"resumed from {source} at step {self._state.step} of {self._state.num_steps}")

    def _gathered(self) -> Mapping[str, Tensor]:
        return gathered_weights(self._accelerator, self._model, is_saved(self._objective(), self._recipe))

    def _objective(self) -> Objective:
        objective = self._accelerator.unwrap_model(self._model)
        assert isinstance(objective, Objective)
        return objective

    def _write(self, folder: Path, weights: Mapping[str, Tensor], step: int) -> None:
        save_model(folder, self._objective(), weights, self._loaded, self.processing, self._recipe)
        (folder / "recipe.toml").write_text(dump_recipe(self._recipe))
        describe(folder, self._run, self._recipe, step)

    @contextmanager
    def _failing_softly(self, target: Path) -> Iterator[list[str]]:
        """Around work of which the main process does the writing: what prevents it is known to all ranks afterwards."""
        problem: list[str] = []
        try:
            yield problem
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            problem.append((isinstance(error, OSError) and error.strerror) or str(error))
            recover(target.parent)
        problem[:] = broadcast_object_list([problem])[0]

    def _remove_later(self) -> None:
        """Remove what the folder holds of steps that are taken again: nothing may resume from it or count it."""
        if not self._accelerator.is_main_process:
            return
        later = [folder for folder in complete_checkpoints(self._folder) if step_of(folder) > self._state.step]
        results = [self._run / "best", self._run / "export"] if self._state.step == 0 else []
        leftovers = [folder for folder in results if is_ours(folder)]
        for folder in [*later, *leftovers]:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (self._folder, self._run):
            recover(folder)
        names = [f"{len(later)} checkpoints after step {self._state.step}"] if later else []
        if names := [*names, *(str(folder) for folder in leftovers)]:
            self._console.line(f"removed of an earlier run: {', '.join(names)}")

    def _rotate(self) -> None:
        for folder in complete_checkpoints(self._folder)[: -self._recipe.checkpoint.keep]:
            shutil.rmtree(folder)
