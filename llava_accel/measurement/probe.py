"""Steps taken for real, as train.py takes them: the memory and the time that they take."""

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava_accel import compat
from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, tensor
from llava_accel.data.sampler import Window
from llava_accel.estimate.flops import Work
from llava_accel.loop.meter import Meter
from llava_accel.loop.optimizer import build_optimizer, build_scheduler
from llava_accel.loop.step import train_step
from llava_accel.loop.update_guard import UpdateGuard
from llava_accel.loop.windows import own_windows
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import Prepared, RunContext
from llava_accel.runtime.engines import prepare
from llava_accel.runtime.timing import wait_for
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import Part, build_order
from llava_accel.setup.micro_batches import load
from llava_accel.setup.state import TrainState, is_due
from llava_accel.setup.vision_cache import attach_features, may_cache


def measure_step(run: RunContext, processing: Processing, corpus: Corpus, batch: Loaded) -> int:
    """Peak bytes of tensors in a step of train.py, weights and optimizer's state included, on the rank that has most.

    The window has as many micro-batches as the recipe accumulates, each of them `batch`. The third of three steps is
    measured: by then the optimizer's state is there, and the backends have settled.
    """
    recipe, device = run.recipe, run.accelerator.device
    before = living_bytes(device)
    run = replace(run, console=Console(False))
    here: Loaded = {
        key: value.to(device, copy=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }
    window = [dict(here) for _ in range(recipe.train.accumulation_steps)]  # the step tells the last one by `is`
    prepared = _prepared(run, build_objective(run, processing)[0], 10)
    guard = UpdateGuard(run, prepared.model, corpus, TrainState(num_steps=10, steps_per_epoch=10))

    def step() -> None:
        train_step(run, prepared, window, 0, guard, lambda _phase: None)

    step()
    step()
    standing_bytes = living_bytes(device) - before + compat.ddp_bucket_bytes(prepared.model)
    peak = torch.tensor([peak_of(step, standing_bytes, device)], device=device)
    return int(torch.as_tensor(run.accelerator.gather(peak)).max())


def _prepared(run: RunContext, objective: Objective, num_steps: int) -> Prepared:
    """The model with optimizer and schedule as train.py prepares them, ready for a step."""
    optimizer = build_optimizer(objective, run.recipe.optim)
    scheduler = build_scheduler(optimizer, run.recipe.optim, num_steps)
    prepared = prepare(run.accelerator, objective, optimizer, scheduler)
    prepared.model.train()
    return prepared


def living_bytes(device: torch.device) -> int:
    """Bytes of all tensors on a device: on a GPU by its allocator, on a CPU of those that Python knows."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    gc.collect()
    storages = {}
    for candidate in gc.get_objects():
        if issubclass(type(candidate), Tensor) and candidate.layout == torch.strided and type(candidate) is not DTensor:
            storage = candidate.untyped_storage()
            if storage.device.type == device.type:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_of(run: Callable[[], object], standing_bytes: int, device: torch.device) -> int:
    """Peak bytes of `standing_bytes` and of all tensors that come and go while `run` runs, and of no other ones.

    On a GPU the allocator counts; on a CPU, where nothing does, every allocation is recorded.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        run()
        return standing_bytes + torch.accelerator.max_memory_allocated(device) - before
    return standing_bytes + max(accumulate(compat.allocations(run), initial=0))


def standing(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers and moments; memory that several of them share counts once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]  # these have not been read
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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
        self.prepared = _prepared(run, objective, len(windows))

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
        """Time the steps as train.py takes them, data included."""
        return self._time(lambda enter: load(self.run, self.part, self.windows, enter))

    def loaded(self) -> float:
        """Seconds of the same loop on batches that are in memory already: those of `bare`, and the loop's own work."""
        windows = list(load(self.run, self.part, self.windows))
        return self._time(lambda enter: iter(windows)).seconds

    def _time(self, load_with: Callable[[Callable[[str], None]], Iterator[list[Loaded]]]) -> Timed:
        recipe, device = self.run.recipe, self.run.accelerator.device
        seen: list[Loaded] = []
        state = TrainState(num_steps=len(self.windows), steps_per_epoch=len(self.windows))
        meter = Meter(self.run, state, measures=self._objective.MEASURES)
        guard = UpdateGuard(self.run, self.prepared.model, self.part.corpus, state)
        wait_for(device)
        begun = time.perf_counter()
        for window in meter.timed(load_with(meter.enter)):
            step = train_step(self.run, self.prepared, window, state.step, guard, meter.enter)
            assert step is not None, "nothing asks a bench to end"
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
        """Seconds of forward, backward, clipping and update alone, on batches that are in memory already."""
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


def with_own_folders(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a cache and a log in a new folder, so that those of the run stay as they are."""
    (folder / "run").mkdir()
    changes = {
        "data": recipe.data.model_copy(update={"cache_dir": str(folder)}),
        "run": recipe.run.model_copy(update={"output_dir": str(folder / "run")}),
        "log": recipe.log.model_copy(update={"trackers": ()}),
    }
    return recipe.model_copy(update=changes)


def first_windows(run: RunContext, part: Part, steps: int) -> list[Window]:
    """Rows of the corpus for the first steps of a run (of its first epoch, at most) on this rank."""
    order = build_order(run.recipe, part, run.accelerator.num_processes)
    return list(own_windows(run, part, order, 0, min(steps, order.steps_per_epoch)))


def _shapes(batch: Loaded) -> Loaded:
    """The batch without its pixels and features, which need not be kept to be counted."""
    large = {name: tensor(batch, name).to("meta") for name in ("pixel_values", "tower_features")}
    return {**batch, **large}
