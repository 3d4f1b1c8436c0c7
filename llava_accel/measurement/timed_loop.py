"""The loop of train.py over a few windows, measured; and the bare steps that it stands around."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from llava_accel.console.output import Console
from llava_accel.data.loader import Loaded, load_windows, tensor
from llava_accel.data.problems import DataError
from llava_accel.data.sampler import Window, windows
from llava_accel.estimate.flops import Work
from llava_accel.loop.meter import Meter
from llava_accel.loop.optimizer import build_optimizer, build_scheduler, learning_rates
from llava_accel.loop.step import count_targets, gradient_sync, seed_step
from llava_accel.measurement.probe import peak_of, standing
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.engines import autocast, clip_gradients, prepare
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
        recipe: Its `run.output_dir` and `data.cache_dir` are the bench's own.
        windows: Rows of the corpus.
    """

    def __init__(
        self,
        recipe: Recipe,
        processing: Processing,
        accelerator: Accelerator,
        objective: Objective,
        part: Part,
        windows: Sequence[Window],
    ) -> None:
        self.recipe, self.accelerator, self.part, self.windows = recipe, accelerator, part, windows
        self._processing, self._objective = processing, objective
        optimizer = build_optimizer(objective, recipe.optim)
        scheduler = build_scheduler(optimizer, recipe.optim, len(windows))
        self.model, self.optimizer, self.scheduler = prepare(recipe, accelerator, objective, optimizer, scheduler)
        self.model.train()

    @property
    def has_cache(self) -> bool:
        """Whether a first epoch differs from later ones."""
        return may_cache(self.recipe)

    def forget_features(self, number: int) -> None:
        """Let the next pass be the first one on a new cache."""
        data = self.recipe.data.model_copy(update={"cache_dir": str(Path(self.recipe.data.cache_dir) / str(number))})
        recipe, silent = self.recipe.model_copy(update={"data": data}), Console(False)
        attach_features(recipe, self._processing, self._objective, (self.part,), self.accelerator, silent)

    def loop(self) -> Timed:
        """As train.py does it, data included."""
        return self._run(self._load)

    def loaded(self) -> float:
        """Seconds of the same steps in the loop's way, on batches that are there already: `bare` and the loop's own."""
        windows = list(self._load(None))
        return self._run(lambda enter: iter(windows)).seconds

    def _run(self, load: Callable[[Callable[[str], None]], Iterator[list[Loaded]]]) -> Timed:
        recipe, accelerator, model, optimizer = self.recipe, self.accelerator, self.model, self.optimizer
        seen: list[Loaded] = []
        state = TrainState(num_steps=len(self.windows), steps_per_epoch=len(self.windows))
        meter = Meter(recipe, accelerator, self._objective, state, Console(False))
        wait_for(accelerator.device)
        begun = time.perf_counter()
        for window in meter.waited(load(meter.enter)):
            seed_step(recipe.run.seed, state.step, accelerator.process_index)
            num_targets = count_targets(window, accelerator)
            for micro_batch in window:
                with gradient_sync(accelerator, model, enabled=micro_batch is window[-1]):
                    meter.enter("forward")
                    loss = model(**micro_batch)
                    meter.enter("backward")
                    accelerator.backward(loss / num_targets * accelerator.num_processes)
                meter.add(loss, micro_batch)
            meter.enter("optimizer")
            rates = learning_rates(optimizer)
            grad_norm = clip_gradients(accelerator, model, recipe.optim.max_grad_norm)
            if float(grad_norm) < float("inf"):  # a step waits for the device here, as in train.py
                optimizer.step()
            self.scheduler.step()
            optimizer.zero_grad()
            state.step += 1
            if is_due(state.step, recipe.log.every, state.num_steps):
                meter.log(state, grad_norm, rates)
            seen += [_shapes(micro_batch) for micro_batch in window]
        meter.enter("saving")
        self._objective.flush_features()
        wait_for(accelerator.device)
        seconds = time.perf_counter() - begun
        meter.close()
        tokens = sum(int(tensor(batch, "num_tokens")) for batch in seen)
        examples = sum(len(tensor(batch, "indices")) for batch in seen)
        return Timed(seconds, dict(meter.seconds), tokens, examples, Work.of(seen))

    def bare(self) -> float:
        """Seconds of forward, backward, clipping and update alone, on batches that are there already."""
        windows = list(self._load(None))
        limit = self.recipe.optim.max_grad_norm or float("inf")
        trained = [parameter for parameter in self._objective.parameters() if parameter.requires_grad]
        self._objective.enter = lambda phase: None
        wait_for(self.accelerator.device)
        since = time.perf_counter()
        for window in windows:
            for micro_batch in window:
                with autocast(self.recipe, self.accelerator):
                    loss = self._objective(**micro_batch)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, limit)
            self.optimizer.optimizer.step()
            self.optimizer.optimizer.zero_grad()
        wait_for(self.accelerator.device)
        return time.perf_counter() - since

    def peak_bytes(self) -> int:
        """The most memory of a pass: weights, gradients, moments and activations, of tensors alone."""
        here = standing([self._objective], self.optimizer.optimizer)
        return peak_of(self.loop, here, self.accelerator.device)

    def _load(self, enter: Callable[[str], None] | None) -> Iterator[list[Loaded]]:
        def on_error(error: DataError) -> None:
            raise error

        return load_windows(
            self.part.corpus,
            self.part.image_reader,
            iter(self.windows),
            workers=self.recipe.data.num_workers,
            device=self.accelerator.device,
            on_error=on_error,
            share_up_to=self.recipe.data.max_length if self.recipe.data.share_prefix else 0,
            enter=enter,
        )


def first_windows(recipe: Recipe, part: Part, steps: int, accelerator: Accelerator) -> list[Window]:
    """Rows of the corpus for the first steps of a run (of its first epoch, at most) on this rank."""
    ranks, size = accelerator.num_processes, recipe.train.per_device_batch_size
    order = build_order(recipe, part, ranks)
    last = min(steps, order.steps_per_epoch)
    dealt = windows(order, 0, last, per_device_batch_size=size, num_ranks=ranks)
    return [[part.rows[batch].tolist() for batch in window[accelerator.process_index]] for window in dealt]


def _shapes(batch: Loaded) -> Loaded:
    """Without the images themselves, which need not be kept to be counted."""
    large = {name: tensor(batch, name).to("meta") for name in ("pixel_values", "tower_features")}
    return {**batch, **large}
