"""One step, taken for real: what memory it takes at most."""

import gc
from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava_accel import compat
from llava_accel.console.output import Console
from llava_accel.data.loader import Loaded
from llava_accel.loop.optimizer import build_optimizer, build_scheduler
from llava_accel.loop.step import gradient_sync
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.engines import clip_gradients, prepare
from llava_accel.setup.assembly import build_objective


def measure_step(recipe: Recipe, processing: Processing, accelerator: Accelerator, batch: Loaded) -> int:
    """Peak bytes of tensors in a step of train.py, weights and optimizer's state included, on the rank that has most.

    A window of as many micro-batches as the recipe accumulates, each of them `batch`. The third of three steps is
    measured: by then the moments are there, and the engines have settled.
    """
    before, silent = living_bytes(accelerator.device), Console(False)
    here: Loaded = {
        key: value.to(accelerator.device, copy=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    objective, _ = build_objective(recipe, processing, accelerator, silent)
    optimizer = build_optimizer(objective, recipe.optim)
    scheduler = build_scheduler(optimizer, recipe.optim, 10)
    model, optimizer, _ = prepare(recipe, accelerator, objective, optimizer, scheduler)
    model.train()

    def step() -> None:
        for number in range(recipe.train.accumulation_steps):
            with gradient_sync(accelerator, model, enabled=number == recipe.train.accumulation_steps - 1):
                accelerator.backward(model(**here))
        clip_gradients(accelerator, model, recipe.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    standing_bytes = living_bytes(accelerator.device) - before + compat.ddp_bucket_bytes(model)
    peak = torch.tensor([peak_of(step, standing_bytes, accelerator.device)], device=accelerator.device)
    return int(torch.as_tensor(accelerator.gather(peak)).max())


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
    return standing_bytes + max(accumulate(compat.allocations(run), initial=0))


def standing(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers and moments; what several of them share counts once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]  # those have not been read
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
