"""Train: the loop. `llava-accel train RECIPE [table.key=value ...]`

Read `train` from top to bottom: build, then steps. One turn of the outer loop is one optimizer step over a window of
micro-batches. Nothing in the path of a step is hidden behind a hook, a callback or a class that calls back.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("train")  # before the imports below, so that help and mistakes are answered at once


import argparse

from llava_accel.checkpoint.resume import find_checkpoint
from llava_accel.checkpoint.store import Checkpoints
from llava_accel.console.output import Console
from llava_accel.loop.finish import finish
from llava_accel.loop.memory_guard import MemoryGuard
from llava_accel.loop.meter import Meter
from llava_accel.loop.optimizer import build_optimizer, build_scheduler, learning_rates
from llava_accel.loop.step import count_targets, gradient_sync, seed_step
from llava_accel.loop.update_guard import UpdateGuard
from llava_accel.loop.validation import Evaluator
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.engines import build_accelerator, clip_gradients, prepare
from llava_accel.runtime.signals import NEVER, Interruption
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import build_order, open_data, train_windows
from llava_accel.setup.run_folder import open_run
from llava_accel.setup.state import TrainState, is_due
from llava_accel.setup.vision_cache import attach_features


def train(recipe: Recipe, interruption: Interruption = NEVER) -> TrainState:
    """Run one fine-tuning job, from a recipe to an adapter that can be used.

    Raises:
        UserError: recipe, data or model cannot be used; the message says what to change.
        Interrupted: the process was asked to end, and the run has saved.
    """
    # Build. The accelerator comes first: engines that shard weights while loading must be there before the weights.
    accelerator = build_accelerator(recipe)
    console = Console(accelerator.is_main_process)
    source = find_checkpoint(recipe)
    open_run(recipe, accelerator)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    training, held_out = open_data(recipe, processing, accelerator, console)
    objective, loaded = build_objective(recipe, processing, accelerator, console, source)
    attach_features(recipe, processing, objective, (training, held_out), accelerator, console)
    order = build_order(recipe, training, accelerator.num_processes)
    state = TrainState.of(recipe.train, order)
    optimizer = build_optimizer(objective, recipe.optim)
    scheduler = build_scheduler(optimizer, recipe.optim, state.num_steps)
    model, optimizer, scheduler = prepare(recipe, accelerator, objective, optimizer, scheduler)
    checkpoints = Checkpoints(recipe, accelerator, model, optimizer, scheduler, loaded, processing, state, console)
    checkpoints.resume(source)
    evaluator = Evaluator(recipe, accelerator, model, processing, held_out, checkpoints, console, interruption)
    meter = Meter(recipe, accelerator, objective, state, console)
    guard = UpdateGuard(recipe, accelerator, model, training.corpus, state, console)
    memory = MemoryGuard(recipe, processing, training.corpus, accelerator)
    evaluator.before_training(state, meter)

    # Train.
    model.train()
    windows = train_windows(recipe, training, order, state, accelerator, meter.enter, interruption)
    for window in meter.waited(windows):
        seed_step(recipe.run.seed, state.step, accelerator.process_index)
        num_targets = count_targets(window, accelerator)
        for micro_batch in window:
            with memory.explained(micro_batch), gradient_sync(accelerator, model, enabled=micro_batch is window[-1]):
                meter.enter("forward")
                loss = model(**micro_batch)
                meter.enter("backward")
                # The sum over this micro-batch by the count over the window and all ranks. Every backend averages
                # gradients over ranks; the last factor makes that average a sum again.
                accelerator.backward(loss / num_targets * accelerator.num_processes)
            meter.add(loss, micro_batch)
        meter.enter("optimizer")
        rates = learning_rates(optimizer)
        grad_norm = clip_gradients(accelerator, model, recipe.optim.max_grad_norm)
        if guard.allows(window, grad_norm, meter.step_sums):
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        state.step += 1
        if is_due(state.step, recipe.log.every, state.num_steps):
            meter.log(state, grad_norm, rates)
        if is_due(state.step, recipe.eval.every or state.steps_per_epoch, state.num_steps):
            evaluator(state, meter)
        if is_due(state.step, recipe.checkpoint.every or state.steps_per_epoch, state.num_steps):
            checkpoints.save(meter.enter)
    finish(recipe, accelerator, objective, (training, held_out), checkpoints, state, meter, console, interruption)
    return state


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel train RECIPE`."""
    train(arguments.loaded, Interruption().listen())
