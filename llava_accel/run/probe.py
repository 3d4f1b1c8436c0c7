"""One batch, run for real: what memory it takes at most."""

from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.run.backend import autocast


def measure_step(
    model: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor | bool],
    recipe: Recipe,
    accelerator: Accelerator,
) -> int:
    """Peak bytes of forward, backward and update, weights and moments included.

    The second of two steps is measured, when the moments are there.
    """
    model.train()
    _step(model, optimizer, batch, recipe, accelerator)
    # A frozen tower is no submodule, and there all the same as long as pictures have no stored features.
    here = standing([model, model.tower], optimizer)
    return peak_of(lambda: _step(model, optimizer, batch, recipe, accelerator), here, accelerator.device)


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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    return standing_bytes + _peak(found)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor | bool],
    recipe: Recipe,
    accelerator: Accelerator,
) -> None:
    with autocast(recipe, accelerator):
        loss = model(**batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


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
