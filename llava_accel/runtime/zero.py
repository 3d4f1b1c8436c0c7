"""DeepSpeed: its configuration from the recipe, sharding, and whole tensors out of its partitions. See engines.py.

DeepSpeed runs in its fp32 mode whatever the recipe's precision: trained weights are fp32 and frozen ones bf16 on every
engine, and the forward pass is under autocast. Its own bf16 mode would round what is trained.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from llava_accel import compat
from llava_accel.exceptions import UserError, in_short
from llava_accel.kernels.low_rank import LowRank
from llava_accel.recipe import Recipe
from llava_accel.storage.tensor_files import Share, divided

REDUCE_BUCKET_SIZE = 500_000_000
"""Number of gradients that DeepSpeed sums at once unless it is told otherwise."""
_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def configured_plugin(recipe: Recipe, *, on_cpu: bool) -> DeepSpeedPlugin:
    """Accelerate's plugin for the profile, with all that the recipe decides written into DeepSpeed's configuration.

    Raises:
        UserError: a configuration file that the profile names cannot be read, or contradicts the recipe.
    """
    if on_cpu:
        compat.leave_out_shared_memory()
    # torch has new names for the two collectives that DeepSpeed calls thousands of times.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    try:
        plugin = DeepSpeedPlugin()
    except (ValueError, AttributeError) as error:  # the latter for JSON that is not an object
        raise UserError(
            f"deepspeed_config_file is {os.environ.get(_FILE)!r} in the launch profile, and DeepSpeed cannot use it "
            f"({in_short(error)}). Correct the path or the file, or leave the key out"
        ) from None
    config = plugin.deepspeed_config
    zero = config["zero_optimization"]
    wanted = {
        _MICRO_BATCH: recipe.train.per_device_batch_size,
        "gradient_accumulation_steps": 1,
        # Without it, Accelerate would put 1.0 there.
        "gradient_clipping": float(recipe.optim.max_grad_norm),
    }
    problems = [
        f"{key} is {config[key]!r} in DeepSpeed's configuration, and the recipe says {value!r}"
        for key, value in wanted.items()
        if config.get(key, "auto") not in ("auto", value)
    ]
    problems += [
        f"{key!r} is in DeepSpeed's configuration, and the recipe's [optim] decides about it"
        for key in ("optimizer", "scheduler")
        if key in config
    ]
    problems += [
        f"{key} is enabled in DeepSpeed's configuration, and run.precision decides about it"
        for key in ("fp16", "bf16", "amp", "torch_autocast")
        if config.get(key, {}).get("enabled") is True
    ]
    if zero.get("overlap_comm") is True:
        problems.append("zero_optimization.overlap_comm is true in DeepSpeed's configuration, and known to give NaNs")
    if problems:
        raise UserError("\n".join(f"{problem}. Leave the key out of the file" for problem in problems))
    config |= wanted
    zero["overlap_comm"] = False
    # For `get_state_dict`. Named after the type that DeepSpeed usually trains in; here it gathers fp32.
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    # The recipe's optimizer is used as it is: DeepSpeed would replace it by its own kernel, compiled on the spot.
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    return plugin


def fit_buckets(accelerator: Accelerator, module: nn.Module) -> None:
    """Let the buffer in which gradients are summed be no larger than all of them: DeepSpeed takes 2 GB, needed or not."""
    assert accelerator.deepspeed_plugin is not None
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    trained = sum(whole_shape(parameter).numel() for parameter in module.parameters() if parameter.requires_grad)
    zero["reduce_bucket_size"] = min(trained, int(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE)))


def zero_stage(accelerator: Accelerator) -> int:
    """The ZeRO stage: 1, 2 or 3."""
    assert accelerator.deepspeed_plugin is not None
    return int(accelerator.deepspeed_plugin.zero_stage)


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """ZeRO-3: partition the module's weights one after the other, from wherever they are; nothing is whole on a GPU."""
    import deepspeed

    assert accelerator.deepspeed_plugin is not None
    config = {**accelerator.deepspeed_plugin.deepspeed_config, "train_batch_size": None}
    del config["train_batch_size"]
    for buffer in module.buffers():
        buffer.data = buffer.data.to(accelerator.device)
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=torch.float32)
    for part in module.modules():
        if isinstance(part, LowRank):
            part.calls_parts = True
    for parameter in module.parameters():
        # DeepSpeed sends rank 0's value to all. Received in place it would turn the pages of the checkpoint's file, which
        # all ranks share, into a copy of this rank's own, a whole model in the end: hence one tensor at a time.
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        compat.partition(parameter, init)


@contextmanager
def narrowed_to(part: nn.Module, engine: Any) -> Iterator[nn.Module]:
    """The engine, which during the block takes `part` for its whole model.

    ZeRO-3 gathers every weight of its model for a state dict. It can leave frozen ones out of the answer, but not out of
    the gathering, and Accelerate has no argument for that.
    """
    whole = engine.module
    engine.module = part
    try:
        yield engine
    finally:
        engine.module = whole


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter over all ranks."""
    part = compat.partition_of(parameter)
    return part[0] if part else parameter.shape


def weight_share(parameter: nn.Parameter, rank: int, ranks: int) -> Share:
    """This rank's share of a weight; an equal share if every rank has it whole."""
    if not (partition := compat.partition_of(parameter)):
        return divided(parameter, rank, ranks)
    return _part_of(partition[0], partition[1], rank)


def moment_shares(
    parameters: Mapping[str, nn.Parameter], optimizer: Any, rank: int, ranks: int
) -> Iterator[tuple[str, str, Share]]:
    """(name, key, this rank's share) of what `moments` yields whole; nothing is gathered."""
    from deepspeed.utils import safe_get_local_optimizer_state

    flat, is_partitioned = compat.flat_partitions(optimizer)[0], any(map(compat.partition_of, parameters.values()))
    fragment = None if is_partitioned else compat.link_moments(optimizer)
    kept = {key: value for key, value in optimizer.optimizer.state[flat].items() if isinstance(value, Tensor)}
    for name, parameter in parameters.items():
        start, fragments = fragment(parameter) if fragment else (0, {})
        for key, value in kept.items():
            if value.shape != flat.shape:
                yield name, key, divided(value, rank, ranks)
            elif partition := compat.partition_of(parameter):
                yield name, key, _part_of(partition[0], safe_get_local_optimizer_state(parameter, key), rank)  # pyright: ignore[reportArgumentType]
            else:
                yield name, key, Share(value.dtype, parameter.shape, start, fragments.get(key, value[:0]))


def _part_of(shape: torch.Size, part: Tensor, rank: int) -> Share:
    """The share of a rank, whose part is as long as all others: the last ones are padded."""
    start = min(rank * part.numel(), shape.numel())
    return Share(part.dtype, shape, start, part.detach().flatten()[: shape.numel() - start])


def put_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a weight its whole value, which every rank has read. Every rank must call it."""
    import deepspeed

    if not compat.partition_of(parameter):
        parameter.copy_(value)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if torch.distributed.get_rank() == 0:
            parameter.copy_(value)


def moments(parameter: nn.Parameter, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """(key, whole value) of all that the optimizer keeps for a parameter. Every rank must call it.

    Args:
        optimizer: DeepSpeed's, around the recipe's, which holds one flat tensor for many parameters.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = compat.flat_partitions(optimizer)[0]
    if not compat.partition_of(parameter):
        compat.link_moments(optimizer)
    for key, value in optimizer.optimizer.state[flat].items():
        if isinstance(value, Tensor) and value.shape == flat.shape:
            yield key, safe_get_full_optimizer_state(parameter, key)  # pyright: ignore[reportReturnType]
        elif isinstance(value, Tensor):
            yield key, value.clone()


def put_state(parameter: nn.Parameter, optimizer: Any, key: str, value: Tensor) -> None:
    """Put back one value of `moments`: into this rank's part of the flat tensors, which are made if need be."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for flat in compat.flat_partitions(optimizer):
        state = optimizer.optimizer.state[flat]
        if not value.ndim:
            is_there = optimizer.optimizer.param_groups[0].get("fused")
            state[key] = value.to(flat.device if is_there else "cpu", copy=True)
        elif key not in state:
            state[key] = torch.zeros_like(flat)
    if value.ndim and (partition := compat.partition_of(parameter)):
        size, rank = partition[1].numel(), torch.distributed.get_rank()
        part = value.flatten()[rank * size : (rank + 1) * size].to(parameter.device)
        safe_set_local_optimizer_state(parameter, F.pad(part, (0, size - len(part))), key)
    elif value.ndim:
        compat.link_moments(optimizer)
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
