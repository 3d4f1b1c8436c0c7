"""Dropout whose mask is made again in the backward pass: only one number per row and one per column are kept."""

from typing import Any

import torch
from torch import Tensor, nn

_RANGE = 1 << 31
"""32-bit integers reach so far on both sides of 0."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
Noise = tuple[Tensor, Tensor]


class LightDropout(nn.Dropout):
    """Dropout that keeps no mask."""

    def forward(self, input: Tensor) -> Tensor:
        return _Dropout.apply(input, self.p) if self.training and self.p else input  # pyright: ignore[reportReturnType]


def draw(inputs: Tensor) -> Noise:
    """Odd random numbers, one for each row and one for each column of a matrix, from torch's own generator.

    Their products, modulo 2^32, decide what is dropped. Any three numbers of a mask are independent of each other.
    """
    rows, columns = inputs.shape
    return _odd((rows, 1), inputs), _odd((1, columns), inputs)


def _odd(shape: tuple[int, int], inputs: Tensor) -> Tensor:
    return torch.randint(-_RANGE, _RANGE, shape, dtype=torch.int32, device=inputs.device).bitwise_or_(1)


def keep_bits(noise: Noise, p: float, dtype: torch.dtype) -> Tensor:
    """An integer for each number of the matrix, as wide as `dtype`: all bits are set where it is kept.

    Args:
        p: Share of the numbers that is dropped.
    """
    rows, columns = noise
    # Integers in place, and not comparisons, which PyTorch computes several times slower on a CPU.
    bits = (rows * columns).bitwise_right_shift_(1)
    return bits.sub_(round((1 - p) * _RANGE) - _RANGE // 2).bitwise_right_shift_(31).to(_INTEGERS[dtype.itemsize])


def kept(values: Tensor, bits: Tensor) -> Tensor:
    """The values with 0 where `keep_bits` has dropped them. They are not scaled."""
    return values.view(bits.dtype).bitwise_and(bits).view(values.dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, p: float) -> Tensor:
        noise = draw(inputs.reshape(-1, inputs.shape[-1]))
        ctx.save_for_backward(*noise)
        ctx.p = p
        return _scaled(inputs, noise, p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scaled(gradients[0], ctx.saved_tensors, ctx.p), None


def _scaled(values: Tensor, noise: Noise, p: float) -> Tensor:
    flat = values.reshape(-1, values.shape[-1])
    return kept(flat, keep_bits(noise, p, flat.dtype)).mul_(1 / (1 - p) if p < 1 else 0.0).view(values.shape)
