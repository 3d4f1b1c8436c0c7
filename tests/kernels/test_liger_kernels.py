"""liger-kernel's own kernels, run by Triton's interpreter on a CPU: where both are installed (conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.decoders import DECODERS

INTERPRETED = Path(__file__).with_name("interpreted.py")


@pytest.mark.slow
def test_its_kernels_compute_our_losses_and_gradients(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(INTERPRETED)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [model.__name__ for _, model in DECODERS]
