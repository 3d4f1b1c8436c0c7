"""Which rank speaks where all of them end: what went wrong is said once, by the rank that it went wrong on."""

import os
import signal
import time

import torch.distributed
from torch.distributed.distributed_c10d import _get_default_store

_KEY = "llava_accel/ended"
_HEAD_START = 1.0  # seconds that the others leave the speaker, before the launcher sees them end and ends it too
_LONGEST_START = 5.0  # seconds between the starts of two processes


def speaks() -> bool:
    """Whether this rank, which ends with an error, is to say why. Call it once.

    The first to end speaks; who loses its connection to it comes later, and has nothing to add. Before ranks are
    connected all meet the same errors (a recipe's): then the first of each machine speaks.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left that it could wait for
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        try:
            is_first = _get_default_store().add(_KEY, 1) == 1
        except RuntimeError:  # the machine that kept it is gone
            return True
        if not is_first:
            time.sleep(_HEAD_START)
        return is_first
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_LONGEST_START)  # as a rule the launcher ends this process meanwhile
    return True
