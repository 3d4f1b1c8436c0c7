"""Evaluation as part of a run: what it decides, and what it leaves in the run folder."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from llava_accel.checkpoint.store import Checkpoints
from llava_accel.exceptions import Interrupted, UserError
from llava_accel.loop.meter import Meter
from llava_accel.model.processing import Processing
from llava_accel.pages.write import report_evaluation, say_overfitting
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.signals import Interruption
from llava_accel.scoring.best import is_better
from llava_accel.scoring.held_out import Prediction, evaluate, write_predictions
from llava_accel.setup.datasets import Part
from llava_accel.setup.state import TrainState, is_due


class Validation:
    """Evaluates, and says whether a step is the best so far and whether to stop. Without data it does nothing.

    Args:
        model: The prepared objective.
        part: The held-out data, or None.
    """

    def __init__(
        self, run: RunContext, model: nn.Module, processing: Processing, part: Part | None, interruption: Interruption
    ) -> None:
        self._run, self._model, self._part, self._interruption = run, model, part, interruption
        self._tokenizer = processing.processor.tokenizer

    def before_training(self, state: TrainState, meter: Meter, checkpoints: Checkpoints) -> None:
        """Score the base, so that every later score can be compared with it; or go on where a run broke off.

        After a resume the base is not scored again, but an evaluation that was broken off is. `best/` is made once more if
        the run broke off before it had it, and whether the run is over is decided again by the recipe, which may have more
        patience now.
        """
        recipe = self._run.recipe
        if state.step == 0:
            if recipe.eval.at_start and self._measure(state, meter) is not None:
                self._report(state, meter)
            return
        state.is_stopped = self._is_out_of_patience(state)
        evaluated = Path(recipe.run.output_dir) / "checkpoints" / f"step-{state.best_step:06d}"
        if recipe.checkpoint.best and state.best_step == state.step and evaluated.is_dir():
            checkpoints.keep_best()
        every = recipe.eval.every or state.steps_per_epoch
        if (
            state.evaluated_step < state.step
            and is_due(state.step, every, state.num_steps)
            and self.finds_best(state, meter)
            and checkpoints.save(meter.enter)
        ):
            checkpoints.keep_best()

    def finds_best(self, state: TrainState, meter: Meter) -> bool:
        """Evaluate this step; whether it is the best so far and is to be kept. Every rank must call it.

        Sets `state.is_stopped` where the recipe has no more patience. An evaluation in the middle of which the run is
        asked to end is given up; the resumed run makes it again.
        """
        recipe = self._run.recipe
        value = self._measure(state, meter)
        if value is None:
            return False
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
        return is_best and recipe.checkpoint.best

    def _is_out_of_patience(self, state: TrainState) -> bool:
        patience = self._run.recipe.eval.patience
        return bool(patience) and state.evaluations_without_gain >= patience

    def _measure(self, state: TrainState, meter: Meter) -> float | None:
        if self._part is None:
            return None
        meter.enter("evaluation")
        try:
            evaluation = evaluate(self._run, self._model, self._part, self._tokenizer, self._interruption)
        except Interrupted:
            return None
        state.evaluated_step = state.step
        self._write(state, evaluation.predictions)
        meter.log_eval(state, evaluation)
        self._run.console.line(f"step {state.step}: {evaluation.summary}")
        metric = self._run.recipe.eval.metric
        if metric not in evaluation.metrics:
            raise UserError(
                f'eval.metric = "{metric}", and no evaluation record has "choices". Add them, or choose another metric'
            )
        return evaluation.metrics[metric]

    def _write(self, state: TrainState, predictions: Sequence[Prediction]) -> None:
        path = Path(self._run.recipe.run.output_dir) / "predictions" / f"step-{state.step:06d}.jsonl"
        try:
            if self._run.accelerator.is_main_process:
                write_predictions(path, predictions)
        except OSError as error:
            self._run.console.line(
                f"{path} could not be written ({error.strerror}). `evaluate` makes these answers again"
            )

    def _report(self, state: TrainState, meter: Meter) -> None:
        if self._part is not None and self._run.accelerator.is_main_process:
            say_overfitting(self._run.recipe, self._run.console)
            report_evaluation(self._run.recipe, state, meter.trackers, self._run.console)
        meter.enter("other")
