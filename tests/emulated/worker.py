"""The process that holds the emulated device: the guard must be there before torch is imported, and stays to its end."""

import contextlib
import ctypes
import gc
import importlib
import io
import multiprocessing
import os
import traceback
import warnings
from typing import Any


def start(guard: str) -> None:
    """Load the guard, and leave out what takes long and has nothing to do with a device: plots, a model's folder anew.

    Args:
        guard: The library made from guard.cpp.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads of transformers would not see the device
    ctypes.CDLL(guard)
    multiprocessing.set_start_method("fork", force=True)  # of data workers: this process itself was not forked
    warnings.simplefilter("ignore")
    import torch
    from markupsafe import Markup

    from emulated import cases
    from llava_accel.pages import plots

    torch.set_num_threads(1)
    plots.drawn = lambda title, height, draw: Markup("<svg></svg>")
    verb: Any = importlib.import_module("llava_accel.train")
    verb.load_processing = cases.read_once(verb.load_processing)
    # Each run ends with a garbage collection, which would go through all that the libraries hold.
    gc.collect()
    gc.freeze()


def call(module: str, function: str, *arguments: Any, **named: Any) -> Any:
    """What a function of this folder returns; its error as one that other processes can read, with what was printed."""
    gc.freeze()  # what earlier runs left, too
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return getattr(importlib.import_module(f"emulated.{module}"), function)(*arguments, **named)
    except BaseException:
        lines = [line for line in traceback.format_exc().splitlines() if "registered at" not in line]
        raise AssertionError(f"{said.getvalue()[-2000:]}\n" + "\n".join(lines)) from None
