"""Evaluation as part of a run: when it is due, what it decides, what it leaves in the run folder."""

import math
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from llava_accel.checkpoint.store import Checkpoints
from llava_accel.console.output import Console
from llava_accel.exceptions import Interrupted, UserError
from llava_accel.loop.meter import Meter
from llava_accel.model.processing import Processing
from llava_accel.pages.write import report_evaluation, say_overfitting
from llava_accel.recipe import Recipe
from llava_accel.runtime.signals import Interruption
from llava_accel.scoring.held_out import Evaluation, Prediction, evaluate, write_predictions
from llava_accel.scoring.metrics import SCORES
from llava_accel.setup.datasets import Part
from llava_accel.setup.state import TrainState, is_due


class Evaluator:
    """Evaluates, keeps the best checkpoint, and says when to stop. Without evaluation data it does nothing.

    Args:
        model: The prepared objective.
        part: The held-out data, or None.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        processing: Processing,
        part: Part | None,
        checkpoints: Checkpoints,
        console: Console,
        interruption: Interruption,
    ) -> None:
        self._recipe, self._accelerator, self._console = recipe, accelerator, console
        self._model, self._processing, self._part, self._checkpoints = model, processing, part, checkpoints
        self._interruption = interruption
        self._folder = Path(recipe.run.output_dir) / "predictions"

    def before_training(self, state: TrainState, meter: Meter) -> None:
        """Score the base, so that every later score has something to stand beside; or take up where a run broke off.

        After a resume the base is not scored again, but an evaluation that was broken off is. `best/` is made once more if
        the run broke off before it had it, and whether the run is over is asked again of the recipe, which may have more
        patience now.
        """
        if state.step == 0:
            if self._recipe.eval.at_start and self._measure(state, meter) is not None:
                self._report(state, meter)
            return
        state.is_stopped = self._is_out_of_patience(state)
        evaluated = Path(self._recipe.run.output_dir) / "checkpoints" / f"step-{state.best_step:06d}"
        if self._recipe.checkpoint.best and state.best_step == state.step and evaluated.is_dir():
            self._checkpoints.keep_best()
        every = self._recipe.eval.every or state.steps_per_epoch
        if state.evaluated_step < state.step and is_due(state.step, every, state.num_steps):
            self(state, meter)

    def __call__(self, state: TrainState, meter: Meter) -> None:
        """Evaluate, save the checkpoint that was evaluated, and keep it if it is the best. Every rank must call it.

        An evaluation in the middle of which the run is asked to end is given up; the resumed run makes it anew.
        """
        value = self._measure(state, meter)
        if value is None:
            return
        gained = not math.isnan(value) and (
            state.best is None or (value < state.best if self._recipe.eval.metric == "loss" else value > state.best)
        )
        state.evaluations_without_gain = 0 if gained else state.evaluations_without_gain + 1
        if gained:
            state.best, state.best_step = value, state.step
        state.is_stopped = self._is_out_of_patience(state)
        if gained and self._recipe.checkpoint.best and self._checkpoints.save(meter.enter):
            self._checkpoints.keep_best()
        if state.is_stopped:
            best = "any number" if state.best is None else f"{state.best:.4f} at step {state.best_step}"
            self._console.line(
                f"stopping: {state.evaluations_without_gain} evaluations without a better {self._recipe.eval.metric} "
                f"than {best} (eval.patience)"
            )
        self._report(state, meter)

    def _is_out_of_patience(self, state: TrainState) -> bool:
        patience = self._recipe.eval.patience
        return bool(patience) and state.evaluations_without_gain >= patience

    def _measure(self, state: TrainState, meter: Meter) -> float | None:
        if self._part is None:
            return None
        tokenizer = self._processing.processor.tokenizer
        meter.enter("evaluation")
        try:
            found = evaluate(
                self._model, self._part, self._recipe, self._accelerator, tokenizer, self._console, self._interruption
            )
        except Interrupted:
            return None
        state.evaluated_step = state.step
        self._write(state, found.predictions)
        meter.log_eval(state, found)
        self._console.line(f"step {state.step}: {describe(found)}")
        metric = self._recipe.eval.metric
        if metric not in found.metrics:
            raise UserError(
                f'eval.metric = "{metric}", and no evaluation record has "choices". Add them, or choose another metric'
            )
        return found.metrics[metric]

    def _write(self, state: TrainState, predictions: Sequence[Prediction]) -> None:
        path = self._folder / f"step-{state.step:06d}.jsonl"
        try:
            if self._accelerator.is_main_process:
                write_predictions(path, predictions)
        except OSError as error:
            self._console.line(f"{path} could not be written ({error.strerror}). `evaluate` makes these answers again")

    def _report(self, state: TrainState, meter: Meter) -> None:
        meter.enter("evaluation")  # saving the best may have come between
        if self._part is not None and self._accelerator.is_main_process:
            say_overfitting(self._recipe, self._console)
            report_evaluation(self._recipe, state, meter.trackers, self._console)
        meter.enter("other")


def describe(found: Evaluation) -> str:
    """The metrics in one line: losses as they are, scores in percent."""
    metrics = found.metrics
    parts = [f"evaluation loss {metrics['loss']:.4f}"]
    for name, title in SCORES.items():
        if name in metrics:
            blind = metrics.get(f"blind_{name}")
            beside = f" (blind {100 * blind:.1f} %)" if blind is not None else ""
            parts.append(f"{title} {100 * metrics[name]:.1f} %{beside}")
    if "num_answers" in metrics:
        parts.append(f"{round(metrics['num_answers']):,} answers, {found.answers_per_s:,.0f} a second")
    return ", ".join(parts)
