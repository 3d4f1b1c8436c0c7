"""The loop of train.py over a few windows, measured; and the bare steps that it stands around."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llava_accel.console.output import Console
from llava_accel.data.loader import Loaded, tensor
from llava_accel.data.sampler import Window
from llava_accel.estimate.flops import Work
from llava_accel.loop.meter import Meter
from llava_accel.loop.optimizer import build_optimizer, build_scheduler
from llava_accel.loop.step import train_step
from llava_accel.loop.update_guard import UpdateGuard
from llava_accel.loop.windows import load, own_windows
from llava_accel.measurement.probe import peak_of, standing
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import prepare
from llava_accel.runtime.timing import wait_for
from llava_accel.setup.datasets import Part, build_order
from llava_accel.setup.state import TrainState, is_due
from llava_accel.setup.vision_cache import attach_features, may_cache


@dataclass(frozen=True, slots=True)
class Timed:
    """One pass over some windows. `seconds` is the clock's, `phases` are parts of it, `work` is what was computed."""

    seconds: float
    phases: dict[str, float]
    num_tokens: int
    num_examples: int
    work: Work


class Job:
    """A model, an optimizer and the windows that are timed.

    Args:
        run: Its recipe's `run.output_dir` and `data.cache_dir` are the bench's own.
        windows: Rows of the corpus.
    """

    def __init__(
        self, run: RunContext, processing: Processing, objective: Objective, part: Part, windows: Sequence[Window]
    ) -> None:
        self.run, self.part, self.windows = replace(run, console=Console(False)), part, windows
        self._processing, self._objective = processing, objective
        optimizer = build_optimizer(objective, run.recipe.optim)
        scheduler = build_scheduler(optimizer, run.recipe.optim, len(windows))
        self.prepared = prepare(run.accelerator, objective, optimizer, scheduler)
        self.prepared.model.train()

    @property
    def has_cache(self) -> bool:
        """Whether a first epoch differs from later ones."""
        return may_cache(self.run.recipe)

    def forget_features(self, number: int) -> None:
        """Let the next pass be the first one on a new cache."""
        recipe = self.run.recipe
        data = recipe.data.model_copy(update={"cache_dir": str(Path(recipe.data.cache_dir) / str(number))})
        run = replace(self.run, recipe=recipe.model_copy(update={"data": data}))
        attach_features(run, self._processing, self._objective, (self.part,))

    def loop(self) -> Timed:
        """As train.py does it, data included."""
        return self._time(lambda enter: load(self.run, self.part, self.windows, enter))

    def loaded(self) -> float:
        """Seconds of the same steps in the loop's way, on batches that are there already: `bare` and the loop's own."""
        windows = list(load(self.run, self.part, self.windows))
        return self._time(lambda enter: iter(windows)).seconds

    def _time(self, load_with: Callable[[Callable[[str], None]], Iterator[list[Loaded]]]) -> Timed:
        recipe, device = self.run.recipe, self.run.accelerator.device
        seen: list[Loaded] = []
        state = TrainState(num_steps=len(self.windows), steps_per_epoch=len(self.windows))
        meter = Meter(self.run, state)
        guard = UpdateGuard(self.run, self.prepared.model, self.part.corpus, state)
        wait_for(device)
        begun = time.perf_counter()
        for window in meter.waited(load_with(meter.enter)):
            step = train_step(self.run, self.prepared, window, state.step, guard, meter.enter)
            state.step += 1
            meter.add(window, step)
            if is_due(state.step, recipe.log.every, state.num_steps):
                meter.log(state, step)
            seen += [_shapes(micro_batch) for micro_batch in window]
        meter.enter("saving")
        self._objective.flush_features()
        wait_for(device)
        seconds = time.perf_counter() - begun
        meter.close()
        tokens = sum(int(tensor(batch, "num_tokens")) for batch in seen)
        examples = sum(len(tensor(batch, "indices")) for batch in seen)
        return Timed(seconds, dict(meter.seconds), tokens, examples, Work.of(seen))

    def bare(self) -> float:
        """Seconds of forward, backward, clipping and update alone, on batches that are there already."""
        windows = list(load(self.run, self.part, self.windows))
        limit = self.run.recipe.optim.max_grad_norm or float("inf")
        trained = [parameter for parameter in self._objective.parameters() if parameter.requires_grad]
        optimizer, device = self.prepared.optimizer.optimizer, self.run.accelerator.device
        wait_for(device)
        since = time.perf_counter()
        for window in windows:
            for micro_batch in window:
                self._objective(**micro_batch).backward()
            torch.nn.utils.clip_grad_norm_(trained, limit)
            optimizer.step()
            optimizer.zero_grad()
        wait_for(device)
        return time.perf_counter() - since

    def peak_bytes(self) -> int:
        """The most memory of a pass: weights, gradients, the optimizer's state and activations, of tensors alone."""
        here = standing([self._objective], self.prepared.optimizer.optimizer)
        return peak_of(self.loop, here, self.run.accelerator.device)


def first_windows(run: RunContext, part: Part, steps: int) -> list[Window]:
    """Rows of the corpus for the first steps of a run (of its first epoch, at most) on this rank."""
    order = build_order(run.recipe, part, run.accelerator.num_processes)
    return list(own_windows(run, part, order, 0, min(steps, order.steps_per_epoch)))


def _shapes(batch: Loaded) -> Loaded:
    """Without the images themselves, which need not be kept to be counted."""
    large = {name: tensor(batch, name).to("meta") for name in ("pixel_values", "tower_features")}
    return {**batch, **large}
