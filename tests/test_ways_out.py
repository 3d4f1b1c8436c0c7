"""However a run ends, it ends within ten seconds, with workers that are decoding or hang, and says once what was wrong."""

import os
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT
from tempfile import TemporaryDirectory

import pytest

from helpers import drive_injected
from helpers.forked import Forked
from helpers.kinds import ALL_KINDS
from helpers.runs import PARITY, mixed_records, write_records
from helpers.verbs import write_recipe

pytestmark = pytest.mark.slow

STEP, LOAD = "llava_accel.loop.step:seed_step", "llava_accel.data.pixels:ImageReader.load"
ANSWER = "llava_accel.scoring.held_out:answer"
CODES = {
    "error": 1,
    "disk": 1,
    "memory": 2,
    "python memory": 1,
    "interrupt": 130,
    "exit": 7,
    "sigterm": 75,
    "killed": -9,
}

SAVE = "llava_accel.checkpoint.store:commit"
EVERY_PLACE = [
    *(f"{STEP}={bad}@3" for bad in (*CODES, "kill worker")),
    *(f"{LOAD}={bad}@2" for bad in ("error", "python memory", "exit", "killed")),
    *(f"{ANSWER}={bad}@1" for bad in ("error", "interrupt", "kill worker")),
    *(f"{SAVE}={bad}@1" for bad in ("error", "sigterm", "kill worker")),
    "llava_accel.train:build_objective=error@1",
    "llava_accel.train:build_optimizer=error@1",
    "llava_accel.loop.finish:show_times=error@1",
    f"{LOAD}=hangs@3,{STEP}=error@3",
    f"{LOAD}=hangs@3,{STEP}=memory@3",
    f"{LOAD}=hangs@3,{STEP}=sigterm@3",
]
SOME_PLACES = [
    *(f"{STEP}={bad}@3" for bad in ("memory", "sigterm", "kill worker")),
    *(f"{LOAD}={bad}@2" for bad in ("error", "killed")),
    f"{ANSWER}=interrupt@1",
    f"{SAVE}=error@1",
    "llava_accel.train:build_optimizer=error@1",
    f"{LOAD}=hangs@3,{STEP}=error@3",
]
# Each takes some seconds: the suite takes a few, and with LLAVA_ACCEL_ALL_KINDS=1 all.
PLACES = EVERY_PLACE if ALL_KINDS else SOME_PLACES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_records(folder / "eval.json", mixed_records(3))
    return write_records(folder / "train.json", mixed_records(24))


def recipe_of(folder: Path, data: Path) -> Path:
    return write_recipe(
        folder,
        data,
        data={"workers": 3, "cache_features": False, "eval": str(data.parent / "eval.json")},
        train={"max_steps": 5, "per_device_batch_size": 1},
        eval={"every": 4, "at_start": False, "blind_limit": 0, "max_new_tokens": 2},
        checkpoint={"every": 2},
    )


def ended(folder: Path, data: Path, places: str, **environment: str) -> tuple[int, float, str]:
    """Exit code, seconds from the first thing that went wrong to the end, and what was printed."""
    mark = folder / "injected"
    command = [sys.executable, drive_injected.__file__, places, str(recipe_of(folder, data))]
    variables = os.environ | environment | {"INJECTED": str(mark)}
    with Forked(
        command, stdout=PIPE, stderr=STDOUT, text=True, cwd=PARITY.parents[1], env=variables, start_new_session=True
    ) as started:
        try:
            out, _ = started.communicate(timeout=90)
        finally:
            started.kill()
    return started.returncode, time.time() - mark.stat().st_mtime if mark.exists() else -1.0, out


@pytest.mark.parametrize("places", PLACES)
def test_a_run_ends_within_ten_seconds(tmp_path: Path, data: Path, places: str) -> None:
    code, seconds, out = ended(tmp_path, data, places)
    assert 0 <= seconds < 10, out
    bad = places.rpartition("=")[2].partition("@")[0]
    in_a_worker = LOAD in places and "," not in places
    expected = 2 if bad == "kill worker" or (in_a_worker and bad in ("killed", "exit")) else CODES.get(bad, 1)
    assert code == expected, out
    if expected == 2:
        # torch hears of a worker's end in a signal handler: what that interrupts may have nobody to raise it to.
        assert out.count("error: ") == 1 and out.count("Traceback") == out.count("Exception ignored in"), out
    assert not (tmp_path / "run" / "run.lock").exists() or bad == "killed"


def test_a_killed_worker_is_one_message_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path, data: Path) -> None:
    code, _, out = ended(tmp_path, data, f"{STEP}=kill worker@4")
    assert code == 2 and "was killed by signal: Killed" in out and "Traceback" not in out, out
    code, _, out = ended(tmp_path, data, f"{STEP}=error@999")
    assert code == 0 and "resumed from" in out, out


def test_a_long_path_for_temporary_files_serves(tmp_path: Path, data: Path) -> None:
    temporary = tmp_path / ("x" * 120)
    temporary.mkdir()
    code, _, out = ended(tmp_path, data, f"{STEP}=error@999", TMPDIR=str(temporary))
    assert code == 0, out


@pytest.mark.parametrize("bad", ["sigterm", "killed"])
def test_no_temporary_file_is_left(data: Path, tmp_path: Path, bad: str) -> None:
    with TemporaryDirectory() as temporary:  # a path that is short enough for sockets
        code, _, out = ended(tmp_path, data, f"{STEP}={bad}@3", TMPDIR=temporary)
        assert code == CODES[bad], out
        until = time.monotonic() + 10
        while (left := list(Path(temporary).glob("pymp-*"))) and time.monotonic() < until:
            time.sleep(0.1)  # workers end a little after the process that was killed
        assert not left
