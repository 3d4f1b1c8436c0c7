"""The process with the emulated device, which all of its tests share."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from emulated import worker

SOURCE = Path(__file__).parent / "guard.cpp"


def compiled(folder: Path) -> Path:
    """The library made from guard.cpp, for the torch that is installed."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here (g++, or what CXX names): the emulated device cannot be made")
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch = Path(found.origin).parent
    library = folder / "guard.so"
    options = ["-O0", "-shared", "-fPIC", "-std=c++20", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    links = [f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    done = subprocess.run([compiler, *options, str(SOURCE), *links], capture_output=True, text=True)
    assert not done.returncode, done.stderr[:3000]
    return library


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Calls a function of a module of this folder, both by name, in the process with the device."""
    guard = compiled(tmp_path_factory.mktemp("guard"))
    with ProcessPoolExecutor(1, get_context("spawn"), worker.start, (str(guard),)) as pool:
        yield lambda *arguments, **named: pool.submit(worker.call, *arguments, **named).result()


@pytest.fixture(scope="session")
def card(emulator: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The same for cases.py, whose functions take the folder of their bases and records first."""
    folder = tmp_path_factory.mktemp("emulated")
    emulator("cases", "prepare", folder)
    return lambda function, *arguments, **named: emulator("cases", function, folder, *arguments, **named)
