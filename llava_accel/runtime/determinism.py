"""The same bits from the same computation on a GPU, where the recipe asks for it: `run.deterministic`.

Order, data and dropout are functions of seed and step in any case. What differs between two runs on a GPU is the order in
which its kernels add up; torch has slower kernels with a fixed order. Its attention kernels have one too, in the backward
pass as well, and flash-attn has one where transformers asks for it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_accel.exceptions import UserError

_WORKSPACE, _FLASH = VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")
"""Environment variables that are set here."""
_REPEATABLE = (":4096:8", ":16:8")
_NO_SUCH_KERNEL = "does not have a deterministic implementation"
_TOO_LATE = "not deterministic because it uses CuBLAS"


def set_determinism(is_wanted: bool) -> None:
    """Choose kernels for all that this process computes from now on; call it before the first call to CUDA.

    Raises:
        UserError: the environment has a setting of cuBLAS with which its results differ.
    """
    torch.use_deterministic_algorithms(is_wanted)
    torch.backends.cudnn.allow_tf32 = False  # torch allows it only for convolutions; here fp32 is fp32 everywhere
    if not is_wanted:
        return
    if (value := os.environ.setdefault(_WORKSPACE, _REPEATABLE[0])) not in _REPEATABLE:
        raise UserError(
            f"run.deterministic: {_WORKSPACE} is {value!r} in the environment, with which cuBLAS adds up in no fixed order. "
            f"Unset it, or set it to {_REPEATABLE[0]!r}"
        )
    os.environ[_FLASH] = "1"  # transformers reads it in every step
    torch.backends.cudnn.benchmark = False


@contextmanager
def determinism_explained() -> Iterator[None]:
    """Around computations: names an operation that has no kernel with a fixed order, and the key that asks for one.

    Raises:
        UserError: instead of torch's RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        if _TOO_LATE in str(error):  # torch reads the variable once, at the first product
            raise UserError(
                "run.deterministic: this process has computed on the GPU before, and so cuBLAS keeps no fixed order in it. "
                f"Train in a new process, or set {_WORKSPACE}={_REPEATABLE[0]} in the environment before this one starts"
            ) from error
        operation, marker, _ = str(error).partition(_NO_SUCH_KERNEL)
        if not marker:
            raise
        raise UserError(
            f"run.deterministic: torch has no kernel for {operation.strip()} here that adds up in a fixed order. Set "
            "run.deterministic = false; order and data stay the same, bits need not"
        ) from error
