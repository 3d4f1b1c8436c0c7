"""One step, taken for real: what memory it takes at most."""

import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded
from llava_accel.loop.optimizer import build_optimizer, build_scheduler
from llava_accel.loop.step import train_step
from llava_accel.loop.update_guard import UpdateGuard
from llava_accel.model.processing import Processing
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.ddp import bucket_bytes
from llava_accel.runtime.engines import prepare
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.state import TrainState


def measure_step(run: RunContext, processing: Processing, corpus: Corpus, batch: Loaded) -> int:
    """Peak bytes of tensors in a step of train.py, weights and optimizer's state included, on the rank that has most.

    A window of as many micro-batches as the recipe accumulates, each of them `batch`. The third of three steps is
    measured: by then the optimizer's state is there, and the backends have settled.
    """
    recipe, device = run.recipe, run.accelerator.device
    before = living_bytes(device)
    run = replace(run, console=Console(False))
    # Each micro-batch is an object of its own: the step knows its last one by that.
    here = [
        {key: value.to(device, copy=True) if isinstance(value, Tensor) else value for key, value in batch.items()}
        for _ in range(recipe.train.accumulation_steps)
    ]
    objective, _ = build_objective(run, processing)
    optimizer = build_optimizer(objective, recipe.optim)
    prepared = prepare(run.accelerator, objective, optimizer, build_scheduler(optimizer, recipe.optim, 10))
    guard = UpdateGuard(run, prepared.model, corpus, TrainState(num_steps=10, steps_per_epoch=10))
    prepared.model.train()

    def step() -> None:
        train_step(run, prepared, here, 0, guard, lambda _phase: None)

    step()
    step()
    standing_bytes = living_bytes(device) - before + bucket_bytes(prepared.model)
    peak = torch.tensor([peak_of(step, standing_bytes, device)], device=device)
    return int(torch.as_tensor(run.accelerator.gather(peak)).max())


def living_bytes(device: torch.device) -> int:
    """Bytes of all tensors on a device: on a GPU by its allocator, on a CPU of those that Python knows."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and found.layout == torch.strided and type(found) is not DTensor:
            storage = found.untyped_storage()
            if storage.device.type == device.type:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_of(run: Callable[[], object], standing_bytes: int, device: torch.device) -> int:
    """Peak bytes of `standing_bytes` and of all tensors that come and go while `run` runs, and of no other ones.

    On a GPU the allocator counts; on a CPU, where nothing does, every allocation is recorded.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return standing_bytes + torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write its stages among the user's lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    return standing_bytes + _peak(found)


def standing(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers and moments; what several of them share counts once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]  # those have not been read
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _peak(found: profile) -> int:
    """The highest sum of what was allocated and freed so far, in the order of time."""
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        highest = max(highest, level)
    return highest
