"""Fine-tunes LLaVA models with a hand-written Accelerate loop: stage 1, LoRA, QLoRA and full.

For notebooks and scripts it offers `load_recipe`, `train`, `evaluate`, `load_trained` and `answer`; torch is imported when
one that needs it is asked for, and not before.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_accel.evaluate import evaluate as evaluate
    from llava_accel.inference.ask import answer as answer
    from llava_accel.inference.ask import load_trained as load_trained
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


__all__ = ["answer", "evaluate", "load_recipe", "load_trained", "train"]
_OFFERED = {
    "load_recipe": "recipe", "train": "train", "evaluate": "evaluate", "load_trained": "inference.ask",
    "answer": "inference.ask",
}  # fmt: skip
"""Name -> the module that it is imported from when it is asked for."""


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    offered = getattr(importlib.import_module(f"{__name__}.{_OFFERED[name]}"), name)
    globals()[name] = offered  # in place of a module of that name, which the import has put there
    return offered


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
