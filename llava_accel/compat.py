"""Every reach into parts of a library that are private, or that its reference does not document.

Each function says where it was read, and why there is no public way; `tests/test_compat.py` holds a contract with each,
which says after an upgrade what broke. Libraries are imported where they are used: verbs must start fast.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast


def count_up(key: str) -> int:
    """Add 1 to a number that all ranks share, and return it; RuntimeError if the process that keeps it has ended.

    Read in torch 2.13, distributed/distributed_c10d.py: `_get_default_store`. `init_process_group` makes the store
    through which ranks find each other, and nothing public returns it. No rank waits for another.
    """
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().add(key, 1)


def end_of_worker(error: Exception) -> str | None:
    """How a data worker ended before its time, or None if the error is about something else.

    Read in torch 2.13, utils/data/dataloader.py, csrc/DataLoader.cpp, MapAllocator.cpp: `RuntimeError`s. None has a class.
    """
    ends = r"(?:worker \(pid.*?\) |(?=unable))(is killed by signal: [\w ]+|exited unexpectedly|unable to \w+ shared memory)"
    match = re.search(ends, str(error)) if isinstance(error, RuntimeError) else None
    return match and match[1].replace("is killed", "was killed").replace("unable", "was unable")


def uncompiled() -> dict[str, str]:
    """The environment in which functions that a library would compile at its import stay uncompiled.

    Read in torch 2.13, _dynamo/eval_frame.py: `_optimize`. bitsandbytes compiles kernels for devices that have no others,
    and importing the compiler takes a fifth of a start. The public TORCH_COMPILE_DISABLE holds for all of a process.
    """
    return {**os.environ, "TORCHDYNAMO_DISABLE": "1"}


def ddp_bucket_bytes(model: nn.Module) -> int:
    """Bytes of the buckets in which DDP sums gradients; 0 for other models.

    Read in torch 2.13, nn/parallel/distributed.py: `_get_ddp_logging_data`. No other Python object shows the buckets.
    """
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(model, DistributedDataParallel):
        return 0
    return sum(int(size) for size in str(model._get_ddp_logging_data()["bucket_sizes"]).split(","))


def make_fsdp_root(module: FSDPModule) -> None:
    """Let a module that FSDP2 has sharded take itself for the root, as its first forward pass would.

    Read in torch 2.13, distributed/fsdp/_fully_shard: `FSDPState._lazy_init`. Only a forward pass of the root does this,
    and a layer that runs before it would take itself for the root.
    """
    module._get_fsdp_state()._lazy_init()


@contextmanager
def fake_tensors(module: nn.Module) -> Iterator[None]:
    """In the block tensors have shapes and types but no numbers, and so have the module's weights, on the CPU.

    Read in torch 2.13, _subclasses/fake_tensor.py: `FakeTensorMode`; nn/modules/module.py: `Module._apply`. The public
    `to_empty` refuses weights that are not fake yet.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cpu"):
        module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        yield


def watch_operations(note: Callable[[list[Tensor], Tensor | None], None]) -> AbstractContextManager[object]:
    """Call `note` after every operation in the block, those of a backward pass included.

    Read in torch 2.13, utils/_python_dispatch.py: `TorchDispatchMode`; utils/_pytree.py: `tree_leaves`. Public hooks see
    modules and gradients, not what is computed between them. `note` is given the tensors that the operation made and, if
    it copied a tensor into another type or to another device, that tensor.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            cast = args[0] if func is torch.ops.aten._to_copy.default else None
            note([leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)], cast)
            return out

    return Watch()


def allocations(run: Callable[[], object]) -> list[int]:
    """Bytes that `run` takes of main memory (and, negative, gives back) for tensors, in the order of time.

    Read in torch 2.13, autograd/profiler.py: `profile.kineto_results`. The public `events()` adds them up by operator.
    """
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes its stages among the user's lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # pyright: ignore[reportAttributeAccessIssue]


def silu_gradient(gradient: Tensor, input: Tensor) -> Tensor:
    """The gradient of silu's input from that of its output, in one pass.

    Read in torch 2.13, native/native_functions.yaml: `silu_backward`. The public way records a graph of its own.
    """
    import torch

    return torch.ops.aten.silu_backward(gradient, input)


def attention_kernel(config: PreTrainedConfig) -> str:
    """The attention kernel that a model with this config uses, by transformers' name.

    Read in transformers 5.23, configuration_utils.py: `_attn_implementation`. Nothing public tells which one it is.
    """
    return str(config._attn_implementation)


def set_attention_kernel(config: PreTrainedConfig, kernel: str) -> None:
    """Let a model with this config use another attention kernel from its next forward pass on.

    Read in transformers 5.23, configuration_utils.py: `_attn_implementation`. The public `set_attn_implementation` takes
    the source file of the model's class for proof that it can, and FSDP2 makes classes of its own.
    """
    config._attn_implementation = kernel


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """In the block transformers takes each row for one sequence, and makes no other mask than a causal one.

    Read in transformers 5.23, masking_utils.py: `find_packed_sequence_indices`. It looks at the values of positions, for
    which every forward pass waits for the device, and shapes without numbers have none. No argument leaves it out.
    """
    from transformers import masking_utils

    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


def checkpoint_layer(layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
    """Let a `GradientCheckpointingLayer` compute itself again in the backward pass, through `checkpoint`.

    Read in transformers 5.23, modeling_layers.py: `_gradient_checkpointing_func`. The public
    `gradient_checkpointing_enable` takes all layers of a model.
    """
    layer.gradient_checkpointing = True  # pyright: ignore[reportArgumentType]  it is not a submodule
    layer._gradient_checkpointing_func = checkpoint  # pyright: ignore[reportArgumentType]


def load_model(kind: Any, config: PreTrainedConfig, state: Mapping[str, object], **settings: Any) -> Any:
    """A model with the weights of `state`, which may be slices of safetensors files: each is read when its turn comes.

    Read in transformers 5.23, core_model_loading.py: `_materialize_copy`. `from_pretrained` documents a state dict of
    tensors, which would all be in memory at once. The settings are those of `from_pretrained`.
    """
    model, info = kind.from_pretrained(None, config=config, state_dict={**state}, output_loading_info=True, **settings)
    assert not any(info.values()), info  # the caller has compared every name and shape
    return model


def new_projector(config: PreTrainedConfig) -> nn.Module:
    """A LLaVA's projector alone, of whatever family, with PyTorch's own initial weights.

    Read in transformers 5.23, models/llava/modeling_llava.py: `LlavaMultiModalProjector`. Only whole models are public.
    """
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    return LlavaMultiModalProjector(config)  # pyright: ignore[reportArgumentType]  those of other families have the same


def tower_states(tower: nn.Module, pixel_values: Tensor, num_layers: int) -> Tensor:
    """Hidden states (images, tokens, channels) of a CLIP or SigLIP tower after its first `num_layers` layers.

    Read in transformers 5.23, models/clip/modeling_clip.py: `CLIPVisionModel.forward`, and SigLIP's. The public
    `output_hidden_states` computes all layers and keeps what each of them gives.
    """
    from transformers import CLIPVisionModel

    hidden = tower.embeddings(pixel_values)  # pyright: ignore[reportCallIssue]
    if isinstance(tower, CLIPVisionModel):
        hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:num_layers]:  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        hidden = layer(hidden, None)  # pyright: ignore[reportCallIssue]
    return hidden


def tokenizer_backend(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The object of the tokenizers library inside a tokenizer; its `to_str` is the text of a tokenizer.json.

    Read in transformers 5.23, tokenization_utils_tokenizers.py: `backend_tokenizer`; tokenizers 0.23: `to_str`, whose
    form is not documented. No public setting takes the leading space away, or makes an added token special.
    """
    return tokenizer.backend_tokenizer


def replace_tokenizer(tokenizer: PreTrainedTokenizerFast, description: str) -> None:
    """Rebuild a tokenizer from another tokenizer.json.

    Read in transformers 5.23, tokenization_utils_tokenizers.py: `_tokenizer`. The public `backend_tokenizer` cannot be set.
    """
    tokenizer._tokenizer = type(tokenizer_backend(tokenizer)).from_str(description)


def forget_deepspeed() -> None:
    """Keep transformers from sharding what it loads, as it does once it knows of ZeRO-3.

    Read in transformers 5.23, integrations/deepspeed.py: `unset_hf_deepspeed_config`. Accelerate tells transformers, and
    nothing public takes it back.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def pretend_gpus() -> None:
    """Let Accelerate believe that the CPU processes of this launch have a GPU each.

    Read in accelerate 1.15, state.py: `PartialState._shared_state`. It knows FSDP only where it found several GPUs.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def tracker_classes(accelerator: Accelerator) -> dict[str, Any]:
    """The trackers that `log_with` names and that are installed: name -> subclass of `GeneralTracker`.

    Read in accelerate 1.15, tracking.py: `LOGGER_TYPE_TO_CLASS`; accelerator.py: `log_with`. The public `init_trackers`
    starts all of them, and fails where one does.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return {str(name): LOGGER_TYPE_TO_CLASS[str(name)] for name in accelerator.log_with}


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling its collectives in shared memory, in which ranks wait for one that was killed.

    Read in deepspeed 0.19, ops/__init__.py: `__compatible_ops__`, and comm/torch.py: `build_shm_op`. There is no setting.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def partition(parameter: nn.Parameter, init: Any) -> None:
    """Leave each rank its part of a weight, as ZeRO-3 does.

    Read in deepspeed 0.19, runtime/zero/partition_parameters.py: `Init._convert_to_zero_parameters`. The public
    `Init(module=...)`, of which `init` is one, takes a whole module, and writes to where it is: into a mapped file.
    """
    init._convert_to_zero_parameters([parameter])


def partition_of(parameter: nn.Parameter) -> tuple[torch.Size, Tensor] | None:
    """A partitioned weight's shape over all ranks, and this rank's part, flat and padded; None for other weights.

    Read in deepspeed 0.19, runtime/zero/partition_parameters.py: `ds_shape` and `ds_tensor`. Nothing public tells.
    """
    return (parameter.ds_shape, parameter.ds_tensor) if "ds_id" in vars(parameter) else None  # pyright: ignore[reportAttributeAccessIssue]


def flat_partitions(optimizer: Any) -> list[Tensor]:
    """This rank's part of the trained weights, a tensor for each group, which the optimizer inside DeepSpeed's updates.

    Read in deepspeed 0.19, runtime/zero/stage3.py: `fp32_partitioned_groups_flat`; runtime/zero/stage_1_and_2.py:
    `single_partition_of_fp32_groups`. The public `safe_get_*` cannot tell which keys a state has.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def link_moments(optimizer: Any) -> Callable[[Any], tuple[int, Mapping[str, Tensor]]]:
    """Let ZeRO-2 look its moments up again: it does so after the update of its first group, when the others have none.

    Read in deepspeed 0.19, runtime/zero/stage_1_and_2.py: `_lazy_init_hp_params_optimizer_state`; utils/tensor_fragment.py:
    `tensor_fragment`. The public `safe_*` see what was looked up, and gather it. Returns a function of a weight: where in
    it, flattened, this rank's moments begin, and the moments by key; (0, {}) if this rank keeps none.
    """
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
    return lambda p: (
        (p._hp_mapping.lp_fragment_address.start, p._hp_mapping.optim_fragment) if p._hp_mapping else (0, {})
    )


def keep_storage_format(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place when a CPU with bf16 runs them in evaluation mode.

    Read in bitsandbytes 0.50, nn/modules.py: `Linear4bit.support_avx512bf16_for_cpu`. There is no setting. Repacking
    rounds the scales to bf16, so an evaluation would change the base; and it fails on widths that 32 does not divide.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]  it is not a submodule


def packed_weights(parameter: nn.Parameter) -> tuple[str, int] | None:
    """Type and number of the weights that a 4-bit parameter stands for, or None for any other parameter.

    Read in bitsandbytes 0.50, nn/modules.py: `Params4bit.quant_type`, `quant_state.shape`. Its shape is that of the
    storage. Its class is not compared, as importing that takes seconds.
    """
    kind, state = getattr(parameter, "quant_type", None), getattr(parameter, "quant_state", None)
    return None if kind is None else (str(kind), parameter.numel() if state is None else state.shape.numel())


def hub_http_error() -> type[Exception]:
    """The error that the hub's client raises without a connection: that of requests, httpx or httpx2, by its version.

    Read in huggingface_hub 2.4, errors.py: `HTTPError`. The public errors are only for answers of the hub.
    """
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    return HTTPError
