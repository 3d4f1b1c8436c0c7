"""Checkpoints: complete or not there at all, enough to resume from and to use as they are.

A folder `checkpoints/step-000100` holds the usable weights (`model/save.py`) and, under `engine/`, moments and position
(`progress.py`). It is written beside its place, hashed as it is written, flushed, listed in `manifest.json`, read back, and
then renamed. That may go on while the next steps run: then all that they change is copied first.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate.utils import broadcast_object_list
from torch import Tensor

from llava_accel.checkpoint import progress
from llava_accel.checkpoint.background import SHARE_OF_FREE, WORTH_IT, Background, free_main_memory
from llava_accel.checkpoint.contents import Contents
from llava_accel.checkpoint.model_card import describe
from llava_accel.exceptions import UserError, in_short
from llava_accel.model.build import LoadedModel
from llava_accel.model.processing import Processing
from llava_accel.model.save import load_saved, step_saved
from llava_accel.runtime.context import Prepared, RunContext
from llava_accel.runtime.engines import load_optimizer_state, weight_setter
from llava_accel.setup.run_folder import before_release
from llava_accel.setup.state import TrainState
from llava_accel.storage.atomic import (
    MANIFEST,
    beside,
    commit,
    flush,
    is_complete,
    is_of_the_disk,
    is_ours,
    known_pieces,
    recover,
    remove,
)
from llava_accel.storage.run_weights import complete_checkpoints, name_of, step_of
from llava_accel.storage.tensor_files import Chunk, Pieces, copied, write

_THREADS = 8  # of each process, to hash and write
_BACKGROUND_THREADS = 2  # while steps are computed
_SILENCE_S = 5.0
_PATIENCE_S = 600.0
_LONGEST_WRITE = timedelta(hours=6)


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """A folder without its tensors, the name that it will have, and what this rank writes into it."""

    folder: Path
    target: Path
    parts: list[Chunk]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        prepared: Holds the trainable weights and the optimizer's state to save.
        loaded: The model as it was loaded, for names and fingerprint.
    """

    def __init__(
        self, run: RunContext, prepared: Prepared, loaded: LoadedModel, processing: Processing, state: TrainState
    ) -> None:
        self._recipe, self._accelerator, self._console = run.recipe, run.accelerator, run.console
        self._model, self._objective = prepared.model, prepared.objective
        self._optimizer, self._scheduler = prepared.optimizer, prepared.scheduler
        self.processing, self._state = processing, state
        self._contents = Contents(run, prepared, loaded, processing)
        self._run_folder, self._own = Path(run.recipe.run.output_dir), progress.own_code(run.recipe)
        self._folder = self._run_folder / "checkpoints"
        self._saved_step = self._failed_step = -1
        self._problem = ""  # of the last write, on the main process
        self._background, self._in_background, self._has_told = Background(), False, False
        self._ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # Its own connections: steps send over the others at the same time.
        several = self._contents.is_divided and self._accelerator.num_processes > 1
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WRITE) if several else None
        before_release(self._end)

    def save(self, enter: Callable[[str], None]) -> bool:
        """Write a checkpoint of this step unless there is one. Every rank must call it.

        Args:
            enter: Told the phase that begins (`runtime/timing.py`).

        Returns:
            Whether there is one now, or one is being written (`settled`). If the disk is full or the folder cannot be
            written, the reason is printed, and the run and its older checkpoints stay as they are.
        """
        if self._state.step in (self._saved_step, self._failed_step):
            return self._saved_step == self._state.step
        enter("saving")
        self.settled()
        self._saved_step = self._state.step
        begun = self._begin(self._folder / name_of(self._state.step), self._state.step, with_engine=True)
        if begun is None:
            self._agree()
        elif self._goes_to_background(begun.parts):
            copy = replace(begun, parts=[copied(part) for part in begun.parts])
            self._in_background = True
            self._background.start(lambda: self._complete(copy, _BACKGROUND_THREADS))
        else:
            self._complete(begun, _THREADS)
            self._agree()
        enter("other")
        return self._saved_step == self._state.step

    def settled(self) -> bool:
        """Wait until nothing is being written; returns whether the last save has succeeded. Every rank must call it."""
        if self._in_background:
            if not self._background.wait(_SILENCE_S):
                self._console.line("checkpoint: waiting for the last one, which is still being written")
            self._background.finish()
            self._in_background = False
            self._agree()
        return self._saved_step >= 0

    def take_best(self) -> int:
        """Put the weights of `best/` into the model, if the run keeps one. Every rank must call it.

        For the end of a run: it then exports, verifies and shows what every verb loads.

        Returns:
            The step whose weights the model holds now.
        """
        best = self._run_folder / "best"
        there = self._accelerator.is_main_process and self._recipe.checkpoint.best and is_complete(best)
        step = broadcast_object_list([step_saved(best) if there else None])[0]
        if step is not None and step != self._state.step:
            load_saved(best, self._objective, weight_setter(self._accelerator))
        return self._state.step if step is None else step

    def export(self, folder: Path, step: int) -> None:
        """Write what inference needs: weights, processor, template, recipe. Every rank must call it.

        Args:
            step: That of the weights that the model holds.

        Raises:
            UserError: the folder cannot be written.
        """
        begun = self._begin(folder, step, with_engine=False)
        if begun is not None:
            self._complete(begun, _THREADS)
        if problem := broadcast_object_list([self._problem])[0]:
            raise UserError(
                f"{folder} could not be written ({problem}). Make room there, or make the folder writable, and repeat "
                "the command: it goes on from the last checkpoint"
            )

    def keep_best(self) -> None:
        """Make `best/` a copy of the newest checkpoint without its engine folder, and write its score into it."""
        source, step = self._folder / name_of(self._state.step), self._state.step
        if not self._accelerator.is_main_process:
            return
        if self._in_background:
            self._background.start(lambda: self._copy_best(source, step))
        else:
            self._copy_best(source, step)

    def resume(self, source: Path | None) -> None:
        """Go on from a checkpoint whose weights and position the run was built with; None starts from the beginning.

        Another engine or another number of ranks may have written it, if a step is the same portion of the data.

        Raises:
            UserError: its moments belong to other weights.
        """
        self._remove_later()
        if source is None:
            return
        moments = progress.read_optimizer_state(source / "engine")
        load_optimizer_state(self._accelerator, self._model, self._optimizer, moments)
        progress.advance(self._scheduler, self._state.step)
        if source.resolve().parent == self._folder.resolve():
            self._saved_step = self._state.step
        else:  # another run's, whose best is not here
            self._state.best, self._state.best_step, self._state.evaluations_without_gain = None, 0, 0
        self._console.line(f"resumed from {source} at step {self._state.step} of {self._state.num_steps}")

    def _begin(self, target: Path, step: int, *, with_engine: bool) -> "_Unfinished | None":
        """Make the folder with all but its tensors; None if the disk does not take it, which is noted."""
        sums = self._accelerator.gather(self._state.unlogged[None]) if with_engine else None
        taken = self._contents.take(with_moments=with_engine)
        made: list[tuple[Path, dict[str, str]] | None] = [None]
        with self._noting_problems(target):
            if self._accelerator.is_main_process:
                folder = beside(target)
                if isinstance(sums, Tensor):
                    (folder / "engine").mkdir()
                    progress.write_position(
                        folder / "engine", self._recipe, self._accelerator, self._state, self._own, sums
                    )
                made = [(folder, self._contents.lay_out(folder, taken, step))]
        if (announced := broadcast_object_list(made)[0]) is None:
            return None
        folder, names = announced
        return _Unfinished(folder, target, self._contents.chunks(taken, names))

    def _goes_to_background(self, parts: Sequence[Chunk]) -> bool:
        """Whether these are written while the next steps run; every rank gets the same answer."""
        wanted = self._recipe.checkpoint.background
        if wanted is False:
            return False
        own = sum(part.nbytes for part in parts)
        has_room = own * self._ranks_here <= SHARE_OF_FREE * free_main_memory()
        told = torch.tensor([[wanted is True or own >= WORTH_IT, not has_room]], device=self._accelerator.device)
        of_ranks = self._accelerator.gather(told)
        assert isinstance(of_ranks, Tensor)
        is_worth_it, lacks_room = of_ranks.any(0).tolist()
        if is_worth_it and lacks_room and not self._has_told:
            self._has_told = True
            self._console.line(
                "checkpoint.background: there is not enough main memory for a copy of what is saved "
                f"({own * self._ranks_here / 2**30:,.1f} GiB on this machine), so training waits while it is written"
            )
        return is_worth_it and not lacks_room

    def _complete(self, begun: "_Unfinished", threads: int) -> None:
        """Write the tensors, and give the folder its name when all ranks have written theirs. Every rank must call it.

        Errors of the disk are noted on the main process.
        """
        with self._noting_problems(begun.target):
            written = self._of_all_ranks(begun, threads)
            if not self._accelerator.is_main_process:
                return
            known: Pieces = {}
            for problem, pieces in written:
                if problem:
                    raise OSError(errno.EIO, problem, str(begun.folder))
                for file, own in pieces.items():
                    known.setdefault(file, []).extend(own)
            for lines in self._run_folder.glob("*.jsonl"):  # a resumed run relies on their being written
                flush(lines)
            commit(begun.folder, begun.target, known=known)
            if begun.target.parent == self._folder:
                self._rotate()

    def _of_all_ranks(self, begun: "_Unfinished", threads: int) -> list[tuple[str, Pieces]]:
        """Write this rank's tensors; the main process gets each rank's problem ("" if none) and the pieces it wrote."""
        own: tuple[str, Pieces] = ("", {})
        try:
            several = self._ranks_here < self._accelerator.num_processes
            own = ("", write(begun.folder, begun.parts, threads, is_shared_by_machines=several))
        except OSError as error:
            own = (in_short(error), {})
        if self._group is None:
            return [own]
        gathered: list[tuple[str, Pieces]] = [own] * self._accelerator.num_processes
        is_main = self._accelerator.is_main_process
        torch.distributed.gather_object(own, gathered if is_main else None, dst=0, group=self._group)
        return gathered

    def _copy_best(self, source: Path, step: int) -> None:
        target = self._run_folder / "best"
        if not is_ours(source):  # it could not be written, as a line has said
            return
        try:
            unfinished = beside(target)
            left_out = shutil.ignore_patterns("engine", MANIFEST)
            shutil.copytree(source, unfinished, ignore=left_out, dirs_exist_ok=True)
            describe(unfinished, self._run_folder, self._recipe, step)
            known = {file: pieces for file, pieces in known_pieces(source).items() if (unfinished / file).is_file()}
            commit(unfinished, target, known=known)
        except OSError as error:
            recover(target.parent)
            self._console.line(f"checkpoint: {target} could not be written ({in_short(error)}) and stays what it was")

    @contextmanager
    def _noting_problems(self, target: Path) -> Iterator[None]:
        """Around writing: a full disk and the like end it, and are noted in `_problem` for `_agree` and `export`."""
        self._problem = ""
        try:
            yield
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            self._problem = in_short(error)
            recover(target.parent)
            if target.parent == self._folder:
                self._console.line(
                    f"checkpoint: {target} could not be written ({self._problem}). The run goes on with the checkpoints "
                    "that it has and tries again at the next interval; make room there, or make the folder writable"
                )

    def _agree(self) -> None:
        """Let all ranks know whether the last save has succeeded."""
        if broadcast_object_list([self._problem])[0]:
            self._failed_step, self._saved_step = self._saved_step, -1

    def _end(self) -> None:
        """Finish what is being written before the run folder is released, however the run has ended."""
        if not self._background.is_busy or isinstance(sys.exception(), KeyboardInterrupt):
            return
        self._console.line(
            f"checkpoint: the last one is being written; waiting for it, at most {_PATIENCE_S / 60:.0f} minutes"
        )
        if not self._background.wait(_PATIENCE_S):
            self._console.line("checkpoint: it is given up, and the older ones stay")

    def _remove_later(self) -> None:
        """Remove what the folder holds from steps that will be taken again: nothing may resume from it or count it."""
        if not self._accelerator.is_main_process:
            return
        later = [folder for folder in complete_checkpoints(self._folder) if step_of(folder) > self._state.step]
        results = [self._run_folder / "best", self._run_folder / "export"] if self._state.step == 0 else []
        leftovers = [folder for folder in results if is_ours(folder)]
        for folder in [*later, *leftovers]:
            remove(folder)
        for folder in (self._folder, self._run_folder):
            recover(folder)
        names = [f"{len(later)} checkpoints after step {self._state.step}"] if later else []
        if names := [*names, *(str(folder) for folder in leftovers)]:
            self._console.line(f"removed from an earlier run: {', '.join(names)}")

    def _rotate(self) -> None:
        for folder in complete_checkpoints(self._folder)[: -self._recipe.checkpoint.keep]:
            remove(folder)
