"""fp32 matrix products on a CPU through oneDNN, where a probe finds them exact.

PyTorch uses oneDNN for them only if rounding to bf16 is allowed. A CPU with AMX then rounds; one without still computes in
fp32, and some are faster at it than with the library that PyTorch uses otherwise.
"""

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F

Matmul = Literal["onednn", "native"]

MOST_ERROR = 1e-6
"""Relative to fp64. fp32 stays below it in any order of summation, and bf16 is a thousand times above it."""
LEAST_WIDTH = 384
"""Narrower layers lose more time in each call than they gain: measured at 128 (a loss) and 384 (a gain)."""
_ROWS, _WIDTH = 128, (2048, 1024)


def use_matmul(matmul: Matmul) -> None:
    """Compute all fp32 products of this process that way from now on; for a process that computes on its CPU."""
    torch.set_float32_matmul_precision("medium" if matmul == "onednn" else "highest")


def matmul_in_use() -> Matmul:
    """The way that `use_matmul` has set last."""
    return "onednn" if torch.get_float32_matmul_precision() == "medium" else "native"


@cache
def onednn_error() -> float:
    """The largest relative error of oneDNN in the three products of a linear layer: output, and both gradients.

    Infinite where PyTorch does not use it: in a build without it, and on a CPU for which it chooses other kernels, whose
    numbers are then the same to the last bit.
    """
    if not torch.backends.mkldnn.is_available():
        return float("inf")
    generator = torch.Generator().manual_seed(0)
    input, weight, gradient = (
        torch.randn(shape, generator=generator) for shape in ((_ROWS, _WIDTH[0]), _WIDTH[::-1], (_ROWS, _WIDTH[1]))
    )
    exact = _products(input.double(), weight.double(), gradient.double())
    before = matmul_in_use()
    use_matmul("native")
    native = _products(input, weight, gradient)
    use_matmul("onednn")
    computed = _products(input, weight, gradient)
    use_matmul(before)
    if all(torch.equal(a, b) for a, b in zip(computed, native, strict=True)):
        return float("inf")
    return max(float((a - b).norm() / b.norm()) for a, b in zip(computed, exact, strict=True))


def _products(input: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    output = F.linear(input.requires_grad_(), weight.requires_grad_())
    return output.detach(), *torch.autograd.grad(output, (input, weight), gradient)
