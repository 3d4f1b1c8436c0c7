"""Elementwise work of a decoder layer, its backward passes written by hand: fewer passes over memory, and less is kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_accel import compat


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up; only the two are kept for the backward pass."""
    return _Gated.apply(gate, up)  # pyright: ignore[reportReturnType]


def gated_gradients(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` and `up`. `gradient`, that of the product, is overwritten."""
    of_up = F.silu(gate).mul_(gradient)
    return compat.silu_gradient(gradient.mul_(up), gate), of_up


def normed(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Each vector divided by its root mean square, times the weight."""
    return _Normed.apply(inputs, weight, epsilon)  # pyright: ignore[reportReturnType]


def rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions: each vector's first half and second half turn into each other.

    Args:
        heads: [rows, seq, heads, size].
        cosine: [rows, seq, size], as is the sine; both halves of it are the same.
    """
    return _Rotated.apply(heads, cosine[:, :, None], sine[:, :, None])  # pyright: ignore[reportReturnType]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gated_gradients(gradients[0].clone(), *ctx.saved_tensors)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = inputs.float() if inputs.dtype.itemsize == 2 else inputs
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(inputs.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(inputs, weight, scale)
        return (wide * scale).mul_(weight).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        inputs, weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        wide, size = inputs.to(scale.dtype), inputs.shape[-1]
        of_weight = (
            (gradient * wide * scale).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        )
        scaled = (gradient * weight).to(scale.dtype)
        along = torch.linalg.vecdot(scaled, wide).unsqueeze(-1).mul_(scale * scale * scale).div_(size)
        return scaled.mul_(scale).addcmul_(wide, along, value=-1).to(inputs.dtype), of_weight, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(heads, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turn(gradients[0], cosine, sine, -1), None, None


def _turn(heads: Tensor, cosine: Tensor, sine: Tensor, way: int) -> Tensor:
    half = heads.shape[-1] // 2
    turned = heads * cosine
    turned[..., :half].addcmul_(heads[..., half:], sine[..., :half], value=-way)
    turned[..., half:].addcmul_(heads[..., :half], sine[..., half:], value=way)
    return turned
