"""FSDP2: sharding by PyTorch's own `fully_shard`, and whole tensors out of the shards. See engines.py."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GradientCheckpointingLayer

from llava_accel import compat
from llava_accel.storage.tensor_files import Share, divided


def start_rehearsal() -> None:
    """Make Accelerate accept FSDP without a GPU."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    compat.pretend_gpus()


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Divide every weight among the ranks, one layer at a time; weights outside the layers form a group of their own.

    Layers are gathered in the type that they have: frozen weights in the recipe's, trained ones in fp32, as everywhere.
    """
    plugin = accelerator.state.fsdp_plugin
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    offload = plugin.cpu_offload if isinstance(plugin.cpu_offload, OffloadPolicy) else OffloadPolicy()  # pyright: ignore[reportOptionalMemberAccess]
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    again = bool(plugin.reshard_after_forward)  # pyright: ignore[reportOptionalMemberAccess]
    for layer in [child for child in module.modules() if isinstance(child, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=again, mp_policy=policy, offload_policy=offload)
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)


@contextmanager
def whole_root(module: FSDPModule) -> Iterator[None]:
    """Keep the group outside the layers gathered during the block."""
    compat.make_fsdp_root(module)
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter over all ranks."""
    return parameter.shape


def put_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a weight its whole value, which every rank has read."""
    parameter.copy_(_divided_as(parameter, value) if isinstance(parameter, DTensor) else value)


def moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """(key, whole value) of all that an optimizer keeps for a parameter, with any engine but DeepSpeed."""
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, int):
            yield f"{key}:int", torch.tensor(value)
        elif isinstance(value, Tensor):
            yield key, value.full_tensor() if isinstance(value, DTensor) else value


def weight_share(tensor: Tensor, rank: int, ranks: int) -> Share:
    """This rank's share of a weight or moment: its rows, or an equal share if every rank has it whole."""
    if not isinstance(tensor, DTensor):
        return divided(tensor, rank, ranks)
    rows, local = tensor.shape[0], tensor.to_local().detach()
    first = min(rank * -(-rows // ranks), rows)  # as torch.chunk divides them
    return Share(tensor.dtype, tensor.shape, first * (tensor.numel() // max(1, rows)), local.flatten())


def moment_shares(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, rank: int, ranks: int
) -> Iterator[tuple[str, str, Share]]:
    """(name, key, this rank's share) of what `moments` yields whole; nothing is gathered."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, int):
                yield name, f"{key}:int", divided(torch.tensor(value), rank, ranks)
            elif isinstance(value, Tensor):
                yield name, key, weight_share(value, rank, ranks)


def put_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, key: str, value: Tensor) -> None:
    """Put back one value of `moments`, divided as the parameter is."""
    state = optimizer.state[parameter]
    if key.endswith(":int"):
        state[key.removesuffix(":int")] = int(value)
    elif isinstance(parameter, DTensor) and value.ndim:
        state[key] = _divided_as(parameter, value)
    else:
        # torch keeps counts of steps on the CPU, unless one kernel does all of an update.
        is_there = value.ndim or optimizer.param_groups[0].get("fused")
        state[key] = value.to(parameter.device if is_there else "cpu", copy=True)


def _divided_as(parameter: DTensor, value: Tensor) -> DTensor:
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
