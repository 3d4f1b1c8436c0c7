"""Evaluation as part of a run: what it decides, and what it leaves in the run folder."""

import time
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list
from torch import nn

from llava_accel.checkpoint.store import Checkpoints
from llava_accel.estimate.answers import questions_at_once
from llava_accel.exceptions import Interrupted, UserError
from llava_accel.loop.memory_guard import evaluation_explained
from llava_accel.loop.meter import Meter
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.signals import Interruption
from llava_accel.scoring.best import is_better, read_lines
from llava_accel.scoring.held_out import AtOnce, Prediction, evaluate
from llava_accel.setup.datasets import Part
from llava_accel.setup.state import TrainState, is_due
from llava_accel.storage.jsonl import write_json_lines
from llava_accel.storage.run_weights import name_of

_MOST_AT_START = 500
"""Examples that the base is scored on unless the recipe says otherwise: its score need not be exact."""
_REPORT_EVERY = 30.0
"""Seconds between two reports of a run that goes on: all ranks wait while one is drawn, for about half a second."""


class Validation:
    """Evaluates, keeps the best step, and says whether to stop. Without data it does nothing.

    Args:
        model: The prepared objective.
        part: The held-out data, or None.
    """

    def __init__(
        self, run: RunContext, model: nn.Module, checkpoints: Checkpoints, part: Part | None, interruption: Interruption
    ) -> None:
        self._run, self._model, self._part, self._interruption = run, model, part, interruption
        self._checkpoints, self._report_is_due = checkpoints, 0.0
        self._at_once = None if part is None else AtOnce(questions_at_once(run, checkpoints.processing, part))

    def before_training(self, state: TrainState, meter: Meter) -> None:
        """Score the base, so that every later score can be compared with it; or go on where a run broke off.

        After a resume the base is not scored again, but an evaluation that was broken off is. `best/` is made once more if
        the run broke off before it had it, and whether the run is over is decided again by the recipe, which may have more
        patience now.
        """
        recipe = self._run.recipe
        if state.step == 0:
            at_most = _MOST_AT_START if recipe.eval.at_start is True else int(recipe.eval.at_start)
            if at_most and self._measure(state, meter, at_most) is not None:
                self._report(state, meter)
            return
        state.is_stopped = self._is_out_of_patience(state)
        evaluated = Path(recipe.run.output_dir) / "checkpoints" / name_of(state.best_step)
        if recipe.checkpoint.best and state.best_step == state.step and evaluated.is_dir():
            self._checkpoints.keep_best()
        every = recipe.eval.every or state.steps_per_epoch
        if state.evaluated_step < state.step and is_due(state.step, every, state.num_steps):
            self.evaluate(state, meter, self._found_before(state))

    def evaluate(self, state: TrainState, meter: Meter, known: float | None = None) -> None:
        """Evaluate this step, and keep it if it is the best so far. Every rank must call it.

        Sets `state.is_stopped` where the recipe has no more patience. An evaluation in the middle of which the run is
        asked to end is given up; the resumed run makes it again.

        Args:
            known: The value of the recipe's metric, where this step was evaluated before the run broke off.
        """
        recipe = self._run.recipe
        value = self._measure(state, meter) if known is None else known
        if value is None:
            return
        state.evaluated_step = state.step
        is_best = is_better(recipe.eval.metric, value, state.best)
        state.evaluations_without_gain = 0 if is_best else state.evaluations_without_gain + 1
        if is_best:
            state.best, state.best_step = value, state.step
        state.is_stopped = self._is_out_of_patience(state)
        if state.is_stopped:
            best = "any number" if state.best is None else f"{state.best:.4f} at step {state.best_step}"
            self._run.console.line(
                f"stopping: {state.evaluations_without_gain} evaluations without a better {recipe.eval.metric} "
                f"than {best} (eval.patience)"
            )
        self._report(state, meter)
        if is_best and recipe.checkpoint.best and self._checkpoints.save(meter.enter):
            self._checkpoints.keep_best()

    def _found_before(self, state: TrainState) -> float | None:
        """The value of the recipe's metric that the run measured at this step after its last save, if it did."""
        recipe, values = self._run.recipe, list[float]()
        if self._run.accelerator.is_main_process:
            lines = read_lines(Path(recipe.run.output_dir) / "metrics.jsonl")
            at_this_step = [line["eval"] for line in lines if "eval" in line and line["step"] == state.step]
            values = [scores[recipe.eval.metric] for scores in at_this_step if recipe.eval.metric in scores]
        values = broadcast_object_list([values])[0]
        return values[-1] if values else None

    def _is_out_of_patience(self, state: TrainState) -> bool:
        patience = self._run.recipe.eval.patience
        return bool(patience) and state.evaluations_without_gain >= patience

    def _measure(self, state: TrainState, meter: Meter, at_most: int = 0) -> float | None:
        if self._part is None:
            return None
        tokenizer = self._checkpoints.processing.processor.tokenizer
        meter.enter("evaluation")
        try:
            with evaluation_explained(lambda: self._saved(state, meter)):
                evaluation = evaluate(
                    self._run, self._model, self._part, tokenizer, self._interruption, self._at_once, at_most
                )
        except Interrupted:
            return None
        self._write(state, evaluation.predictions)
        meter.log_eval(state, evaluation)
        metric = self._run.recipe.eval.metric
        is_best = state.step > 0 and is_better(metric, evaluation.metrics.get(metric, float("nan")), state.best)
        self._run.console.line(evaluation.line(state.step, metric, is_best))
        if metric not in evaluation.metrics:
            raise UserError(
                f'eval.metric = "{metric}", and no evaluation record has "choices". Add them, or choose another metric'
            )
        return evaluation.metrics[metric]

    def _saved(self, state: TrainState, meter: Meter) -> str:
        """Save a checkpoint, as the run is about to end in an evaluation; returns a sentence for its error.

        One of several ranks cannot save alone: the others are still answering.
        """
        if state.step and self._run.accelerator.num_processes == 1:
            self._checkpoints.save(meter.enter)
        return "The same command then goes on from the last checkpoint"

    def _write(self, state: TrainState, predictions: Sequence[Prediction]) -> None:
        path = Path(self._run.recipe.run.output_dir) / "predictions" / f"step-{state.step:06d}.jsonl"
        try:
            if self._run.accelerator.is_main_process:
                write_json_lines(predictions, path)
        except OSError as error:
            self._run.console.line(
                f"{path} could not be written ({error.strerror}). `evaluate` makes these answers again"
            )

    def _report(self, state: TrainState, meter: Meter) -> None:
        # No report before the first step, as plotting takes a second to import, unless trackers want the base's answers.
        # The end of the run writes a report of its own.
        is_due = 0 < state.step < state.num_steps and not state.is_stopped and time.monotonic() >= self._report_is_due
        is_wanted = state.step > 0 or meter.trackers.are_there
        if is_wanted and self._part is not None and self._run.accelerator.is_main_process:
            from llava_accel.pages.write import report_progress, say_overfitting, send_images

            say_overfitting(self._run.recipe, self._run.console)
            send_images(self._run.recipe, state, meter.trackers, self._run.console)
            if is_due:
                report_progress(self._run.recipe, state, self._run.console)
                self._report_is_due = time.monotonic() + _REPORT_EVERY
        meter.enter("other")
