"""Train: the loop. `llava-accel train RECIPE [table.key=value ...]`

Read `train` from top to bottom. One turn of the loop is one optimizer step over a window of micro-batches, and no hook
changes it: a step is `loop/step.py`, its loss `model/objective.py`, and its update `loop/optimizer.py`.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("train")  # before the imports below, so that help and mistakes are answered at once


import argparse

from llava_accel.checkpoint.resume import agree_on_checkpoint, starting_state
from llava_accel.checkpoint.store import Checkpoints
from llava_accel.console.output import Console
from llava_accel.loop.finish import finish
from llava_accel.loop.machine import check_machine, print_own_code
from llava_accel.loop.memory_guard import loading_explained, out_of_memory_explained
from llava_accel.loop.meter import Meter
from llava_accel.loop.optimizer import build_optimizer, build_scheduler
from llava_accel.loop.step import train_step
from llava_accel.loop.update_guard import UpdateGuard
from llava_accel.loop.validation import Validation
from llava_accel.loop.windows import train_windows
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import OnLog, RunContext
from llava_accel.runtime.determinism import determinism_explained
from llava_accel.runtime.engines import build_accelerator, prepare
from llava_accel.runtime.restored import settings_restored
from llava_accel.runtime.signals import NEVER, Interruption
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import build_order, open_data
from llava_accel.setup.figures import source_mix
from llava_accel.setup.header import print_header
from llava_accel.setup.reference import attach_reference
from llava_accel.setup.revisions import pin_revisions
from llava_accel.setup.run_folder import lock_run_folder, run_folders_unlocked, write_run_files
from llava_accel.setup.state import TrainState, is_due
from llava_accel.setup.vision_cache import attach_features


@settings_restored()
@run_folders_unlocked()
@determinism_explained()
def train(recipe: Recipe, interruption: Interruption = NEVER, *, on_log: OnLog | None = None) -> TrainState:
    """Run one fine-tuning job, from a recipe to an adapter in recipe.run.output_dir; returns its last state.

    Args:
        on_log: Gets each line of metrics.jsonl, see `OnLog`.

    Raises:
        UserError: recipe, data or model cannot be used; the message says what to change.
        Interrupted: the process was asked to end, and the run has saved.
    """
    # Build. The accelerator comes first: what divides the weights among ranks must be there before they are read.
    accelerator = build_accelerator(recipe)
    check_machine(recipe, accelerator.device)
    recipe = pin_revisions(recipe, accelerator)
    run = RunContext(recipe, accelerator, Console(accelerator.is_main_process), on_log)
    lock_run_folder(run)
    source = agree_on_checkpoint(run)
    write_run_files(recipe, accelerator)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    training, held_out = open_data(run, processing)
    print_own_code(recipe, run.console)
    order = build_order(recipe, training, accelerator.num_processes)
    print_header(run, order, training, held_out, source)
    state = starting_state(run, order, training, source)
    with loading_explained(run, processing):
        objective, loaded = build_objective(run, processing, source, saves=True)
    attach_features(run, processing, objective, (training, held_out))
    optimizer = build_optimizer(objective, recipe.optim)
    scheduler = build_scheduler(optimizer, recipe.optim, state.num_steps)
    prepared = prepare(accelerator, objective, optimizer, scheduler)
    attach_reference(run, prepared.objective, loaded, processing, (training, held_out), source, keeps=True)
    checkpoints = Checkpoints(run, prepared, loaded, processing, state)
    checkpoints.resume(source)
    interruption.saves_from_now_on()
    validation = Validation(run, prepared.model, checkpoints, held_out, interruption)
    meter = Meter(run, state, source_mix(training), objective.MEASURES)
    guard = UpdateGuard(run, prepared.model, training.corpus, state)
    validation.before_training(state, meter)

    # Train.
    prepared.model.train()
    windows = train_windows(run, training, order, state, meter.enter, lambda: interruption.is_asked)
    for window in meter.timed(windows):
        if state.is_stopped or interruption.ends_before_the_next_step(accelerator):
            break
        with out_of_memory_explained(run, window, training.corpus, processing, meter.phase):
            step = train_step(run, prepared, window, state.step, guard, meter.enter, interruption)
        if step is None:  # a rank that was asked to end had no data for it
            break
        state.step += 1
        meter.add(window, step)
        if is_due(state.step, recipe.log.every, state.num_steps):
            meter.log(state, step)
        # Saved before it is evaluated: whatever goes wrong in an evaluation, its steps are not lost.
        if is_due(state.step, recipe.checkpoint.every or state.steps_per_epoch, state.num_steps):
            checkpoints.save(meter.enter)
        if is_due(state.step, recipe.eval.every or state.steps_per_epoch, state.num_steps):
            validation.evaluate(state, meter)
    finish(run, prepared, (training, held_out), checkpoints, state, meter, interruption)
    return state


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel train RECIPE`."""
    train(arguments.loaded, Interruption().listen())
