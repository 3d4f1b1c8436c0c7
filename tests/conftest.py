"""Fixtures that several rooms share, and how the tests are laid out. Nothing here needs a network, a hub or a GPU.

- tests/ROOM/test_MODULE.py tests llava_accel/ROOM/MODULE.py.
- tests/test_VERB.py runs a verb as its users do, and the other files beside it hold a promise of the README from end to
  end; tests/broken does so for inputs that cannot be used.
- tests/emulated runs the package on a GPU that is none; it needs a C++ compiler.
- tests/helpers is imported by tests, and never collected; bench, gpu and quickstart hold programs whose figures or data
  the documents name.
- `slow` marks what trains for long or starts processes. `-m "not slow"` is the fast subset of `launch/test.sh --fast`.
"""

import copy
import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jaxtyping
import pytest

from helpers import typed
from helpers.kinds import ALL_KINDS

# No torch at the top of this file: the process that only hands out the tests would wait for it, too.
# Tiny models lose time to threads, and runs that are compared bit by bit must sum in the same order in every process.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A script's background jobs ignore Ctrl-C, and so would all that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Accelerate reads it from a file at each save.
importlib.metadata.metadata = cache(importlib.metadata.metadata)

# It goes through all that is frozen, which is a tenth of a second, and each verb asks.
gc.get_freeze_count = lambda: 1

# No test cuts the power, and a checkpoint would wait for the disk with each of its files.
os.fsync = lambda fd: None

typed.quicken()


@pytest.fixture(scope="session", autouse=True)
def drawn() -> Iterator[Any]:
    """Reports have frames in place of their plots: drawing takes longer than all else that a short run does.

    Yields what draws, None where no test imports it. Tests of the pages ask for `plots`.
    """
    if (
        not {"llava_accel.pages.plots", "llava_accel.loop.finish"} & sys.modules.keys()
    ):  # which imports it at a run's end
        yield None
        return
    from markupsafe import Markup

    from llava_accel.pages import plots

    def framed(title: str, height: float, draw: object) -> Markup:
        return Markup('<svg role="img" aria-label="{}"></svg>').format(title)

    original = plots.drawn
    with patch.object(plots, "drawn", framed):
        yield original


@pytest.fixture(scope="session", autouse=True)
def _read_once() -> Iterator[None]:
    """Runs on the same files have copies of one tokenizer: making one of a tokenizer.model takes a tenth of a short run."""
    processing: Any = sys.modules.get("llava_accel.model.processing")
    if processing is None:
        yield
        return
    read, kept = processing.load_tokenizer, dict[object, Any]()

    def load_tokenizer(base: Any) -> Any:
        files = sorted(file for ending in ("json", "model", "jinja") for file in base.folder.glob(f"*.{ending}"))
        about = [(file, file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = (base.layout, type(base.text), *about)
        if key not in kept:
            kept[key] = read(base)
        return copy.deepcopy(kept[key])

    with patch.object(processing, "load_tokenizer", load_tokenizer):
        yield


_SMALL = 2**20  # bytes


@pytest.fixture(scope="session", autouse=True)
def _tried_once() -> Iterator[None]:
    """A tokenizer.json that was found good is not tried again, wherever it lies: each trial is a process."""
    trial: Any = sys.modules.get("llava_accel.model.trial")
    if trial is None:
        yield
        return
    check, good = trial.check_tokenizer, set[bytes]()

    def check_tokenizer(file: Path) -> None:
        content = file.read_bytes() if file.is_file() and file.stat().st_size < _SMALL else b""
        if content not in good:
            check(file)
            good.update([content] if content else [])

    with patch.object(trial, "check_tokenizer", check_tokenizer):
        yield


@pytest.fixture
def plots(drawn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports with their plots."""
    monkeypatch.setattr("llava_accel.pages.plots.drawn", drawn)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """For a test in another precision than those around it: accelerate keeps one for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed

    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained LLaVA in the hub's layout, whose layers 4 bits can pack."""
    from helpers.tiny import make_llava

    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(params=["hub", "original"])
def hub_or_original(request: pytest.FixtureRequest, llava_folder: Path) -> Path:
    """A LLaVA in each of the two layouts."""
    from helpers.runs import PARITY

    return llava_folder if request.param == "hub" else PARITY / "llava-orig"


@pytest.fixture
def tower_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the vision tower's weights as they are read whole from a base's files. Fingerprints read a row of each."""
    from llava_accel.model import weights

    reads: list[str] = []

    class Watched:
        def __init__(self, name: str, tensor: Any) -> None:
            self.name, self.tensor = name, tensor

        def __getitem__(self, key: object) -> Any:
            if key is Ellipsis:
                reads.append(self.name)
            return self.tensor[key]

    def gather(*arguments: Any) -> weights.Stored:
        found = original(*arguments)
        tower = {name: tensor for name, tensor in found.items() if name.startswith("model.vision_tower.")}
        return found | {name: replace(each, tensor=Watched(name, each.tensor)) for name, each in tower.items()}

    original = weights.gather
    monkeypatch.setattr(weights, "gather", gather)
    return reads


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, llava_folder: Path) -> Path:
    """A run of LoRA on that base, two steps long."""
    from helpers.exported import fine_tune, prove_here

    with pytest.MonkeyPatch.context() as patched:
        prove_here(patched)
        model = {"base": str(llava_folder)}
        return fine_tune(tmp_path_factory.mktemp("lora"), model=model, checkpoint={"verify": True})


@pytest.fixture(scope="session")
def lora_exports(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """That run in each form of `llava_accel.export`."""
    from helpers.exported import export, prove_here

    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patched:
        prove_here(patched)
        return {form: export(patched, lora_run, form, folder / form) for form in ("peft", "merged", "llava")}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the train.json and eval.json of interrupted.py."""
    from helpers.interrupted import NUM_RECORDS
    from helpers.runs import mixed_records, write_records

    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "train.json", mixed_records(NUM_RECORDS))
    write_records(folder / "eval.json", mixed_records(3))
    return folder


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run of interrupted.py that nothing interrupted."""
    from helpers.interrupted import settings, train

    return train(settings(tmp_path_factory.mktemp("whole"), data))


TYPED = ("test_exact", "test_train_script", "test_share_prefix", "test_chat", "test_evaluate", "test_original_llava")
"""Slow tests that go through all of the package, from checking data to exports and chatting."""
SHARED = {"lab": "engines", "whole": "interrupted", "lora_run": "exports", "emulator": "emulated"}
"""Fixtures that take long to make, and the group of the tests that use them: one process makes each once."""
LONGEST_FIRST = (
    "engines", "interrupted", "test_start", "test_interruption", "test_matrix", "test_plan", "test_init",
    "exports", "emulated", "test_ways_out", "test_broken_bases", "test_cache", "test_export",
    "test_cards", "test_compiled", "test_traffic", "test_broken_models", "test_which_weights", "test_projector_adapter",
    "test_tiles", "test_figures", "test_behind", "test_beside",
)  # fmt: skip
"""Groups of half a minute and more: one of them at the end would leave the other process without work."""


def pytest_collectstart() -> None:
    """No garbage is collected while all is imported: of modules there is none."""
    gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the tests over the processes of pytest-xdist: by shared fixture or else by file, long groups first.

    What needs one of those fixtures is slow, too.
    """

    def group(item: pytest.Item) -> str:
        uses = getattr(item, "fixturenames", ())
        return next((name for fixture, name in SHARED.items() if fixture in uses), item.path.stem)

    def rank(item: pytest.Item) -> int:
        return LONGEST_FIRST.index(group(item)) if group(item) in LONGEST_FIRST else len(LONGEST_FIRST)

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
        if group(item) in SHARED.values():
            item.add_marker("slow")
    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Collect garbage again; see `_freeze`."""
    gc.enable()


_MANY = 50  # modules
_imported = [0]


def _freeze() -> None:
    """Take the libraries out of garbage collection: each run ends with one, which would go through all they hold."""
    if len(sys.modules) >= _imported[0] + _MANY:
        gc.collect()
        gc.freeze()
        _imported[0] = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Check types at run time in all that is not slow and in TYPED: the slow ones would go the same ways more often."""
    _freeze()
    is_typed = ALL_KINDS or item.path.stem in TYPED or not item.get_closest_marker("slow")
    jaxtyping.config.update("jaxtyping_disable", not is_typed)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Give them back: hypothesis, where it is imported as late as this, looks for what is held."""
    gc.unfreeze()


def pytest_unconfigure() -> None:
    """Collect garbage once and keep the rest out of it: pytest goes through all there is five times more before it ends."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many broken inputs were tried, and how many ended as they should (tests/broken)."""
    counts = {
        outcome: sum("::test_broken_input" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "error", "skipped")
    }
    if any(counts.values()):
        tried = counts["passed"] + counts["failed"] + counts["error"]
        skipped = f", {counts['skipped']} cannot be made here" if counts["skipped"] else ""
        terminalreporter.write_line(f"broken inputs: {tried} tried, {counts['passed']} passed{skipped}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Runs on one process and on two, of any engine: see helpers/jobs.py."""
    from helpers.jobs import Lab

    lab = Lab(tmp_path_factory.mktemp("backends"))
    yield lab
    lab.end()
