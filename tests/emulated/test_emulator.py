"""The emulated device itself: each kind of wait is noticed, each mix of devices refused, and nothing else is."""

import math
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow

Emulator = Callable[..., Any]

WAITS = {
    "item": "x.sum().item()",
    "float": "float(x[0])",
    "bool": "bool(x[0] > 0)",
    "if": "1 if x.sum() > 0 else 2",
    "list": "x.tolist()",
    "a copy to the CPU": "x.cpu()",
    "a copy into a tensor of the CPU": "torch.empty(3).copy_(x)",
    "a copy to the device": "c.to(CUDA)",
    "a copy into a tensor of the device": "x.copy_(c)",
    "non-blocking, but from memory that is not pinned": "c.to(CUDA, non_blocking=True)",
    "a list": "torch.tensor([1.0, 2.0], device='cuda')",
    "a number": "torch.tensor(1.0, device=CUDA)",
    "a number like another": "x.new_tensor(2.0)",
    "an array": "torch.as_tensor(np.ones(3), device='cuda')",
    "nonzero": "x.nonzero()",
    "where": "torch.where(x > 0)",
    "masked_select": "x.masked_select(x > 0)",
    "a mask as index": "x[x > 0]",
    "values to the places of a mask": "x.index_put_((x > 0,), 2 * x)",
    "an index on the CPU": "x[torch.tensor([0, 1])]",
    "unique": "x.unique()",
    "unique_consecutive": "x.unique_consecutive()",
    "bincount": "torch.bincount(n)",
    "repeat_interleave": "x.repeat_interleave(n)",
    "equal": "torch.equal(x, x)",
    "the whole device": "torch.cuda.synchronize()",
    "the accelerator": "torch.accelerator.synchronize()",
    "an event": "event.synchronize()",
}
"""Each is one point where the host waits."""
GOES_ON = {
    "arithmetic": "(x * 2 + 1 - x / 3).exp().sum()",
    "fill": "x.new_full((), 3.0) + torch.zeros(3, device=CUDA) + torch.arange(3, device='cuda')",
    "masked_fill": "x.masked_fill(x > 1, 0.0)",
    "one value to the places of a mask": "x.__setitem__(x > 1, 0.0)",
    "where": "torch.where(x > 1, x, 0.0)",
    "an index on the device": "x[n]",
    "repeat_interleave by a number": "x.repeat_interleave(2)",
    "pinned": "c.pin_memory().to(CUDA, non_blocking=True)",
    "to the CPU later": "x.to('cpu', non_blocking=True)",
    "nothing to copy": "torch.tensor([], device='cuda')",
    "a number of the CPU": "x * torch.tensor(2.0)",
    "an event's question": "event.query()",
    "another type": "x.to(torch.bfloat16)",
    "products": "F.linear(m, m).softmax(-1)",
}
REFUSED = {
    "a sum": "x + c",
    "a product": "m @ torch.ones(3, 3)",
    "a condition": "torch.where(c > 0, x, x)",
    "joined": "torch.cat([x, c])",
    "stacked numbers": "torch.stack([x.sum(), c.sum()])",
    "an embedding": "F.embedding(torch.tensor([0, 1]), m)",
    "a layer on the CPU": "torch.nn.Linear(3, 3)(x)",
    "added at places": "x.index_add_(0, n, c)",
    "values of the CPU at places": "x.index_put_((n,), c)",
    "an array": "x.numpy()",
    "an array by another name": "np.asarray(x)",
    "a generator of the CPU": "torch.rand(3, device=CUDA, generator=torch.Generator())",
    "another type in a product": "m @ m.bfloat16()",
}
AUTOCAST = {
    "F.linear(m, m)": "torch.bfloat16",
    "m @ m": "torch.bfloat16",
    "F.softmax(m.bfloat16(), -1)": "torch.float32",
    "F.layer_norm(m.bfloat16(), (3,))": "torch.float32",
    "F.cross_entropy(m.bfloat16(), n)": "torch.float32",
    "m.bfloat16().sum()": "torch.float32",
    "m.bfloat16().pow(2)": "torch.float32",
    "m.bfloat16() + m": "torch.float32",
    "F.gelu(m.bfloat16())": "torch.bfloat16",
    "F.scaled_dot_product_attention(m[None, None], m[None, None], m[None, None])": "torch.bfloat16",
}
"""Types of results under CUDA's autocast; a softmax, a norm and a sum of a CPU's differ."""


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_noticed(emulator: Emulator, what: str) -> None:
    assert emulator("probes", "waits_of", WAITS[what]) == ("", 1)


@pytest.mark.parametrize("what", GOES_ON)
def test_what_needs_no_wait_has_none(emulator: Emulator, what: str) -> None:
    assert emulator("probes", "waits_of", GOES_ON[what]) == ("", 0)


@pytest.mark.parametrize("what", REFUSED)
def test_devices_and_types_do_not_mix(emulator: Emulator, what: str) -> None:
    error, _ = emulator("probes", "waits_of", REFUSED[what])
    assert "on the CPU" in error or "device" in error or "dtype" in error, error


@pytest.mark.parametrize("what", ["x.cumsum(0)", "torch.histc(x)"])
def test_what_has_no_fixed_order_is_refused_where_one_is_asked_for(emulator: Emulator, what: str) -> None:
    assert "does not have a deterministic implementation" in emulator("probes", "ordered", what)
    assert emulator("probes", "ordered", "n.cumsum(0), x.index_add(0, n, x)") == ""
    assert emulator("probes", "waits_of", what) == ("", 0)


@pytest.mark.parametrize("what", AUTOCAST)
def test_autocast_is_that_of_cuda(emulator: Emulator, what: str) -> None:
    assert emulator("probes", "type_of", what) == AUTOCAST[what]


def test_what_nobody_has_waited_for_is_not_there_yet(emulator: Emulator) -> None:
    early, late = emulator("probes", "read_early")
    assert all(math.isnan(value) for value in early) and late == [1.0, 2.0]
    assert emulator("probes", "asked_early") == (False, True)


def test_a_layer_is_moved_and_has_a_gradient_there(emulator: Emulator) -> None:
    assert emulator("probes", "gradient_of_a_layer") == ([1.0, 1.0], "cuda:0", True)
