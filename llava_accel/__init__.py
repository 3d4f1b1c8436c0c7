"""Fine-tunes LLaVA models with a hand-written Accelerate loop: stage 1, LoRA, QLoRA and full."""

import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_accel.recipe import load_recipe as load_recipe
    from llava_accel.train import train as train


# Rows differ in length, and blocks of a fixed size would leave gaps in a GPU's memory. PyTorch reads it before it first
# takes any, so every way to start a run comes by here; what the user has set stays.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


class _Without(logging.Filter):
    """Drops one message of a library that a user can do nothing about; everything else still comes through."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)


# Said while bitsandbytes is imported, hence here: it would like to download a faster 4-bit kernel for CPUs at run time;
# the one it has gives the same numbers.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_Without("Failed to load CPU gemm_4bit_forward"))


def __getattr__(name: str) -> Any:
    """`from llava_accel import load_recipe, train`: torch is imported when `train` is asked for, and not before."""
    if name == "load_recipe":
        from llava_accel.recipe import load_recipe

        return load_recipe
    if name == "train":
        from llava_accel.train import train

        globals()["train"] = train  # in place of the module, which the import has put there
        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
