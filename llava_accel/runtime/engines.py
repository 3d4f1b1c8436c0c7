"""The Accelerator, and what a run asks of the backend under it. Only this room knows a backend by name.

An engine either keeps a whole model on every rank (one process, DDP, ZeRO-2) or shards it (ZeRO-3, FSDP2). The loop is
the same: what differs is done here, before the first step.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs, release_memory
from torch import Tensor, nn
from torch.distributed import get_default_backend_for_device
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LRScheduler

from llava_accel import compat
from llava_accel.exceptions import UserError
from llava_accel.model.objective import Objective
from llava_accel.model.precision import PRECISIONS, computed_in, precision_name
from llava_accel.recipe import Recipe
from llava_accel.runtime import fsdp2, zero
from llava_accel.runtime.context import Prepared
from llava_accel.runtime.determinism import set_determinism
from llava_accel.runtime.devices import computes_bf16, find_device
from llava_accel.runtime.launch_profile import read_profile
from llava_accel.runtime.restored import keep_process_group
from llava_accel.storage.tensor_files import Share


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """ "auto" is bf16 where an accelerator computes in it and fp16 where it does not; on a CPU fp32, which is exact.

    Some CPUs are faster in bf16, and most are far slower: `setup/header.py` tells the user which this one is.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if computes_bf16(device) else torch.float16


def build_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator for the launch profile in force and this recipe.

    Raises:
        UserError: the profile contradicts the recipe, or asks for something that cannot work; names key, value and remedy.
    """
    profile = read_profile()
    set_determinism(recipe.run.deterministic)
    device = find_device(wants_cpu=profile.wants_cpu)
    dtype, on_cpu = resolve_precision(recipe.run.precision, device), device.type == "cpu"
    profile.check(recipe, "no" if dtype == torch.float32 else precision_name(dtype))
    engine_plugin = zero.configured_plugin(recipe, on_cpu=on_cpu) if profile.backend == "deepspeed" else None
    if profile.backend == "fsdp" and on_cpu:
        fsdp2.start_rehearsal()
    # Naming a communication backend makes Accelerate expect other processes. They wait for an hour, not the usual ten
    # minutes: the first process reads all of the data.
    connection = InitProcessGroupKwargs(backend=get_default_backend_for_device(device), timeout=timedelta(hours=1))
    handlers = [connection] if profile.is_distributed else []
    accelerator = Accelerator(
        # DeepSpeed has its own notion of the device, and Accelerate forgets DeepSpeed where it is told to use the CPU.
        cpu=on_cpu and profile.backend != "deepspeed",
        deepspeed_plugin=engine_plugin,
        # The objective runs under autocast itself, on every backend alike. Here "bf16" would let some of them round what
        # is trained.
        mixed_precision="no",
        # Windows are ours (loop/step.py): the engine's own accumulation would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        # The schedule counts optimizer steps; Accelerate's default would step once for each process.
        step_scheduler_with_optimizer=False,
        kwargs_handlers=handlers,  # pyright: ignore[reportArgumentType]
        log_with=list(recipe.log.trackers) or None,
        project_dir=recipe.run.output_dir,
    )
    keep_process_group()
    if profile.backend == "deepspeed":
        compat.forget_deepspeed()  # `place` shards what was loaded
    if on_cpu and accelerator.num_processes > 1 and accelerator.is_main_process:
        where = f"{accelerator.num_processes} CPU processes over gloo"
        print(f"rehearsal: no GPU here, so {profile.title} runs on {where}. Same numbers, no speed.")
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each rank holds only a part of every weight, so that all ranks must run every module together."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return zero.zero_stage(accelerator) == 3
    return accelerator.distributed_type == DistributedType.FSDP


def load_device(accelerator: Accelerator) -> torch.device | None:
    """Where weights go when they are read: None leaves them where they are, for an engine that then shards them."""
    return None if is_sharded(accelerator) else accelerator.device


def place(objective: Objective, accelerator: Accelerator) -> Objective:
    """Divide the weights among the ranks if the engine does so, one layer at a time; call it before the optimizer is made.

    Every rank holds the same objective when it is called, and from then on runs the tower in every forward pass.
    """
    if is_sharded(accelerator):
        objective.is_sharded = objective.tower_on_every_rank = True
        if accelerator.distributed_type == DistributedType.FSDP:
            fsdp2.shard(objective, accelerator)
        else:
            zero.shard(objective, accelerator)
    return objective


def prepare(
    accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer, scheduler: LRScheduler
) -> Prepared:
    """Hand model, optimizer and schedule to the backend."""
    if accelerator.distributed_type == DistributedType.FSDP:
        # Accelerate's own preparation would shard; matching parameters by address, it mixes up those that are empty here.
        kept = accelerator.prepare_optimizer(optimizer), accelerator.prepare_scheduler(scheduler)
        return Prepared(objective, *kept, objective=objective)  # pyright: ignore[reportArgumentType]
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero.fit_buckets(accelerator, objective)
    return Prepared(*accelerator.prepare(objective, optimizer, scheduler), objective=objective)


def prepare_frozen(accelerator: Accelerator, objective: Objective) -> nn.Module:
    """The objective where it can run, for evaluation without training."""
    if not is_sharded(accelerator):
        return objective.to(accelerator.device)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.prepare(objective)  # its hooks gather the weights
    return objective


def release(prepared: Prepared, parked: nn.Module | None) -> None:
    """Free the device's memory after a run: weights, gradients and the optimizer's state.

    Model and optimizer are referred to from many places, so they stay, and are empty. With an engine that divides the
    weights, a rank keeps its share.

    Args:
        parked: A vision tower that was taken out of the model.
    """
    prepared.optimizer.zero_grad()
    prepared.optimizer.optimizer.state.clear()
    for module in (prepared.model, parked or nn.Module()):
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    release_memory()


def autocast(recipe: Recipe, accelerator: Accelerator) -> torch.autocast:
    """The precision of forward passes outside the loop: the recipe's, whatever the engine."""
    return computed_in(resolve_precision(recipe.run.precision, accelerator.device), accelerator.device)


def take_loss_scale(accelerator: Accelerator, optimizer: AcceleratedOptimizer, scale: float) -> float:
    """Set the loss scale of the next backward passes; returns the factor for losses, 1 if the engine multiplies them.

    DeepSpeed does: it makes its update within the last backward pass, so it multiplies, and divides before it clips, itself.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return scale
    # In its fp32 mode the scale is a plain number, which DeepSpeed never changes.
    optimizer.optimizer.loss_scale = scale  # pyright: ignore[reportAttributeAccessIssue]
    return 1.0


def unscale_gradients(optimizer: AcceleratedOptimizer, factor: float) -> None:
    """Divide gradients by what the losses were multiplied by, a power of two."""
    if factor != 1.0:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / factor)


def whole_root(objective: Objective) -> AbstractContextManager[None]:
    """Keep weights outside the layers (embeddings, lm_head, projector) whole, for calls of parts of the objective alone."""
    return fsdp2.whole_root(objective) if isinstance(objective, FSDPModule) else nullcontext()


def whole_value(value: Tensor) -> Tensor:
    """A value of which each rank may hold a part. Every rank must call it; no host waits."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered_weights(accelerator: Accelerator, model: nn.Module, keep: Callable[[str], bool]) -> dict[str, Tensor]:
    """Name and whole value of every weight that `keep` chooses; empty on other ranks than the main process. Every rank must
    call it.

    It is what `accelerator.get_state_dict` returns for a module that has only these weights: for the whole model it would
    also gather the frozen base. A weight that every rank holds whole is not copied, and is not to be changed.
    """
    if not is_sharded(accelerator) and not accelerator.is_main_process:
        return {}  # DeepSpeed's answer is a copy, which only one rank needs
    part = _part_of(accelerator.unwrap_model(model), keep)  # pyright: ignore[reportArgumentType]
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    with zero.narrowed_to(part, model) if is_deepspeed else nullcontext(part) as asked:
        state: Any = accelerator.get_state_dict(asked)
    return state or {}  # other ranks of ZeRO-3 get None


def _part_of(module: nn.Module, keep: Callable[[str], bool]) -> nn.Module:
    """A module with those parameters of `module` that `keep` chooses: the same objects under the same names."""
    part = nn.Module()
    for name, parameter in module.named_parameters():
        if keep(name):
            *path, last = name.split(".")
            place = part
            for child in path:
                if child not in dict(place.named_children()):
                    place.add_module(child, nn.Module())
                place = place.get_submodule(child)
            place.register_parameter(last, parameter)
    return part


def weight_setter(accelerator: Accelerator) -> Callable[[nn.Parameter, Tensor], None]:
    """A function that gives a prepared weight a value that every rank has read whole. Every rank must call it alike."""
    return zero.put_weight if accelerator.distributed_type == DistributedType.DEEPSPEED else fsdp2.put_weight


def gathered_optimizer_state(
    accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer
) -> Iterator[tuple[str, str, Tensor]]:
    """(parameter, key, whole value) of everything that the optimizer keeps; only the main process gets any.

    Every rank must take every item.
    """
    engine = _engine(accelerator)
    for name, parameter in _trained(accelerator, model).items():
        for key, value in engine.moments(parameter, optimizer.optimizer):
            if accelerator.is_main_process:
                yield name, key, value.detach().cpu()


def weight_shares(accelerator: Accelerator, model: nn.Module) -> dict[str, Share]:
    """This rank's share of every weight, by name. Nothing is gathered or copied, so the shares must not be changed."""
    engine, rank, ranks = _engine(accelerator), accelerator.process_index, accelerator.num_processes
    parameters = accelerator.unwrap_model(model).named_parameters()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: engine.weight_share(parameter, rank, ranks) for name, parameter in parameters}


def optimizer_shares(
    accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer
) -> Iterator[tuple[str, str, Share]]:
    """(parameter, key, this rank's share) of everything that the optimizer keeps. Nothing is gathered or copied."""
    ranks = accelerator.process_index, accelerator.num_processes
    yield from _engine(accelerator).moment_shares(_trained(accelerator, model), optimizer.optimizer, *ranks)


def _trained(accelerator: Accelerator, model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a model, by their names without the backend's wrapper."""
    named = accelerator.unwrap_model(model).named_parameters()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def _engine(accelerator: Accelerator) -> ModuleType:
    """The module that knows how this engine divides weights and moments."""
    return zero if accelerator.distributed_type == DistributedType.DEEPSPEED else fsdp2


def load_optimizer_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    moments: Iterable[tuple[str, str, Tensor]],
) -> None:
    """Give every rank its part of what `gathered_optimizer_state` yielded, under this or another engine; UserError if
    it belongs to other weights."""
    engine, parameters = _engine(accelerator), _trained(accelerator, model)
    # If weights are whole, an optimizer of the user's may keep tensors of any shape.
    is_divided = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    for name, key, value in moments:
        trained = parameters.get(name)
        if trained is None or (is_divided and value.ndim and value.shape != engine.whole_shape(trained)):
            raise UserError(
                f"run.resume: the checkpoint has moments of {name}, which is not trained or has another shape"
            )
        engine.put_state(trained, optimizer.optimizer, key, value)
