"""A GPU that is none: tensors that say cuda:0 and hold CPU values.

Within `Device()` the package sees one GPU. Operations give the CPU's values under CUDA's rules: autocast is CUDA's, tensors
of both devices do not mix, and each point where the host would wait for the device is noted with its place in the package.
The device is slow on purpose: an event is over, and a copy to the CPU that nobody waits for is there, only after a wait.

It needs the guard of guard.cpp in the process (worker.py). What it cannot hold: several GPUs, kernels of other libraries
(bitsandbytes, flash-attn, liger), memory.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from emulated.switches import Wait

PACKAGE = Path(__file__).parents[2] / "llava_accel"
CUDA = torch.device("cuda", 0)
STAGES = {
    "model/tower.py:on": "load",
    "loop/meter.py:waited": "step",
    "loop/step.py:train_step": "step",
    "loop/meter.py:add": "step",
    "loop/meter.py:log": "line",
    "checkpoint/store.py:save": "save",
    "loop/validation.py:before_training": "evaluation",
    "loop/validation.py:evaluate": "evaluation",
    "loop/finish.py:finish": "finish",
}
"""What a run is doing, by the function that it is in; the innermost of them counts."""
WAITING = {
    "_local_scalar_dense": "a number is read",
    "nonzero": "the size of a result is read",
    "masked_select": "the size of a result is read",
    "_unique2": "the size of a result is read",
    "unique_consecutive": "the size of a result is read",
    "unique_dim": "the size of a result is read",
    "unique_dim_consecutive": "the size of a result is read",
    "bincount": "the size of a result is read",
    "repeat_interleave": "the size of a result is read",
    "equal": "a number is read",
}
"""Operations whose result the host needs before it can go on."""
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
UNORDERED = (
    "_adaptive_avg_pool2d_backward", "upsample_linear1d_backward", "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward", "grid_sampler_2d_backward",
    "nll_loss2d_forward", "nll_loss2d_backward", "histc", "kthvalue", "put_", "max_unpool2d", "cumsum",
)  # fmt: skip
"""Have no kernel of CUDA that adds up in a fixed order, says torch.use_deterministic_algorithms; cumsum of real numbers."""
JOINING = ("cat", "stack")
"""These refuse even a number that is a CPU tensor."""


class Refused(RuntimeError):
    """What a GPU would not do."""


class DeviceTensor(torch.Tensor):
    """Says that it is on the device, and holds its values in a CPU tensor."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False) -> Any:
        if isinstance(held, DeviceTensor):  # as a class of parameters is called by libraries that copy one
            return held.detach().requires_grad_(requires_grad)
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "layout": held.layout}
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, dtype=held.dtype, device=CUDA, requires_grad=requires_grad, **layout
        )
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Any], *_: object) -> "DeviceTensor":
        return DeviceTensor(inner["held"])

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.tolist:
            note("values are read")
            return args[0].held.tolist()
        if func is torch.Tensor.numpy or func is torch.Tensor.__array__:
            raise Refused(f"numpy() of a tensor on the device, at {place()}")
        if func is torch.Tensor.untyped_storage:
            return args[0].held.untyped_storage()
        owner = getattr(func, "__self__", None)
        if owner is torch.Tensor.data and func.__name__ == "__get__":
            return args[0].detach()
        if owner is torch.Tensor.data and isinstance(args[0], DeviceTensor) and isinstance(args[1], DeviceTensor):
            args[0].held = args[1].held
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})

    def __repr__(self, *_: object, **__: object) -> str:
        return f"on the device: {self.held!r}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return DeviceTensor, (self.held,)


class Event:
    """torch.Event: over as soon as the host has waited for the device."""

    def __init__(self, *_: object, **__: object) -> None:
        self._waits, self._at = 0, 0.0

    def record(self) -> None:
        self._waits, self._at = _noted.number, time.perf_counter()

    def query(self) -> bool:
        return _noted.number > self._waits

    def synchronize(self) -> None:
        note("an event is waited for")

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other._at - self._at)


class Device(TorchDispatchMode):
    """The block in which there is a GPU; `waits` are those of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Device":
        _noted.waits = self.waits
        for name, value in _cuda().items():
            self._stack.enter_context(patch.object(torch.cuda, name, value))
        for name, value in _accelerator().items():
            self._stack.enter_context(patch.object(torch.accelerator, name, value))
        self._stack.enter_context(patch("torch.Event", Event))
        self._stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        # Data on the device are made on the CPU and copied, as one can see from here.
        torch._C._set_only_lift_cpu_tensors(True)
        self._stack.enter_context(_Assignments())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return compute(func, args, kwargs or {})


class _Assignments(TorchFunctionMode):
    """`parameter.data = value` takes a parameter to the device; it becomes an object of another class then."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        is_set = getattr(func, "__self__", None) is torch.Tensor.data and func.__name__ == "__set__"
        if is_set and isinstance(args[1], DeviceTensor) and not isinstance(args[0], DeviceTensor):
            moved = torch.nn.Parameter(args[1].detach(), requires_grad=args[0].requires_grad)
            return torch.utils.swap_tensors(args[0], moved)
        return func(*args, **(kwargs or {}))


class _Noted:
    """Waits so far, and what arrives at the next one."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.number = 0
        self.arriving: list[tuple[torch.Tensor, torch.Tensor]] = []


_noted = _Noted()


def note(kind: str) -> None:
    """The host waits for the device here."""
    ours = list(_frames())
    names = [f"{_relative(frame)}:{frame.f_code.co_name}" for frame in ours]
    stage = next((STAGES[name] for name in names if name in STAGES), "")
    _noted.waits.append(Wait(kind, f"{_relative(ours[0])}:{ours[0].f_lineno}" if ours else "", stage))
    _noted.number += 1
    for target, value in _noted.arriving:
        target.copy_(value)
    _noted.arriving = []


def place() -> str:
    """The line of the package that this is called from."""
    return next((f"{_relative(frame)}:{frame.f_lineno}" for frame in _frames()), "no line of the package")


def _frames() -> Iterator[FrameType]:
    """The package's own, from the inside out; of autograd's thread, which has none, those of the one that waits."""
    main = threading.main_thread().ident
    for frame in (sys._getframe(1), sys._current_frames()[main] if main else None):
        found = False
        while frame is not None:
            if frame.f_code.co_filename.startswith(str(PACKAGE)):
                found = True
                yield frame
            frame = frame.f_back
        if found:
            return


def _relative(frame: FrameType) -> str:
    return str(Path(frame.f_code.co_filename).relative_to(PACKAGE))


def compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation on the values that tensors hold, if one of them is on the device or the result is to be there."""
    leaves = tree_leaves((args, kwargs))
    inside = [one for one in leaves if isinstance(one, DeviceTensor)]
    wanted = kwargs.get("device")
    if not inside and not any(_is_cuda(one) for one in leaves):
        return func(*args, **kwargs)
    name, name_of_overload = func._schema.name.removeprefix("aten::"), func._overloadname
    if name == "_fused_sdp_choice":
        return 0  # of operations that are emulated themselves
    if torch.are_deterministic_algorithms_enabled() and name in UNORDERED and inside[0].is_floating_point():
        raise Refused(f"{name} does not have a deterministic implementation, at {place()}")
    if any(isinstance(one, torch.Generator) and one.device.type == "cpu" for one in leaves):
        raise Refused(f"{name}: a generator of the CPU for a tensor on the device, at {place()}")
    if isinstance(wanted, torch.device) and wanted.type == "meta":  # shapes alone
        return func(*tree_map(lambda one: one.held if isinstance(one, DeviceTensor) else one, tuple(args)), **kwargs)
    if name == "_to_copy" and _is_cuda(wanted) != bool(inside) and wanted is not None:
        return _moved(args[0], kwargs)
    if name == "copy_" and isinstance(args[0], DeviceTensor) != isinstance(args[1], DeviceTensor):
        _note_copy(args[1], non_blocking=bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
    elif inside:
        _check_devices(name, leaves, inside)
        _note_reading(name, name_of_overload, args)
    result = func(*tree_map(_held, tuple(args)), **tree_map(_held, dict(kwargs)))
    written = [place for place, one in enumerate(func._schema.arguments) if one.alias_info and one.alias_info.is_write]
    if written and len(func._schema.returns) == 1 and isinstance(result, torch.Tensor):
        first = written[0]
        return args[first] if first < len(args) else kwargs[func._schema.arguments[first].name]
    return tree_map(lambda one: DeviceTensor(one) if isinstance(one, torch.Tensor) else one, result)


def _is_cuda(device: object) -> bool:
    return isinstance(device, torch.device) and device.type == "cuda"


def _held(one: object) -> object:
    if isinstance(one, DeviceTensor):
        return one.held
    return torch.device("cpu") if isinstance(one, torch.device) and one.type == "cuda" else one


def _moved(value: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """A copy from one device to the other."""
    rest = {key: one for key, one in kwargs.items() if key not in ("device", "pin_memory", "non_blocking")}
    non_blocking = bool(kwargs.get("non_blocking"))
    if not isinstance(value, DeviceTensor):
        _note_copy(value, non_blocking=non_blocking)
        return DeviceTensor(torch.ops.aten._to_copy(value, **rest))
    result = torch.ops.aten._to_copy(value.held, **rest)
    _note_copy(value, non_blocking=non_blocking)
    if not non_blocking:
        return result
    # What is read before a wait is not there yet.
    garbage = torch.full_like(result, math.nan if result.is_floating_point() else 99).pin_memory()
    _noted.arriving.append((garbage, result))
    return garbage


def _note_copy(source: torch.Tensor, *, non_blocking: bool) -> None:
    if not source.numel():  # there is nothing to copy
        return
    if isinstance(source, DeviceTensor):
        if not non_blocking:
            note("a copy to the CPU")
    elif not (non_blocking and source.is_pinned()):
        note("a copy from memory that is not pinned" if non_blocking else "a copy to the device")


def _check_devices(name: str, leaves: Sequence[object], inside: Sequence[torch.Tensor]) -> None:
    outside = [one for one in leaves if isinstance(one, torch.Tensor) and not isinstance(one, DeviceTensor)]
    mixed = [one for one in outside if one.device.type == "cpu" and (one.ndim or name in JOINING)]
    if not mixed or name == "copy_":
        return
    if name in INDEXING and all(one.dtype in (torch.int64, torch.int32, torch.bool, torch.uint8) for one in mixed):
        note("an index on the CPU")
        return
    shapes = (
        f"{[tuple(one.shape) for one in mixed]} on the CPU, {[tuple(one.shape) for one in inside[:3]]} on the device"
    )
    raise Refused(f"{name}: {shapes}, at {place()}")


def _note_reading(name: str, overload: str, args: Sequence[Any]) -> None:
    if name == "repeat_interleave" and overload != "Tensor":
        return
    if name in WAITING:
        note(WAITING[name])
    if name not in INDEXING:
        return
    masks = [one for one in args[1] if isinstance(one, torch.Tensor) and one.dtype in (torch.bool, torch.uint8)]
    # One value for all that a single mask chooses is filled in without a count of them.
    is_fill = name.startswith(("index_put", "_index_put")) and len(args[1]) == 1 and args[2].numel() == 1
    if masks and not is_fill:
        note("an index by a mask")


class _Properties:
    name = "an emulated GPU"
    total_memory = 80 << 30
    major, minor = 9, 0
    multi_processor_count = 132
    gcnArchName = ""


def _cuda() -> dict[str, Any]:
    """What `torch.cuda` answers where there is one GPU. Random numbers are the CPU's, so that runs can be compared."""
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_initialized": True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: True,  # then torch.manual_seed seeds the CPU alone
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _device: None,
        "_exchange_device": lambda _device: 0,
        "_maybe_exchange_device": lambda _device: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda *_: _Properties.name,
        "get_device_properties": lambda *_: _Properties,
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (70 << 30, 80 << 30),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 20,
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "synchronize": lambda *_: note("the device is waited for"),
        "Event": Event,
    }


def _accelerator() -> dict[str, Any]:
    """What `torch.accelerator` answers where it goes past `torch.cuda`."""
    return {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "get_memory_info": lambda *_: (70 << 30, 80 << 30),
        "memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1 << 20,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: note("the device is waited for"),
    }
