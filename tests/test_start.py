"""A command answers at once where no library is needed, and what it starts ends with our own lines and codes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers import forked
from helpers.interrupted import checkpoints, settings
from helpers.jobs import ranks
from helpers.runs import PARITY, mixed_records, recipe, write_records
from llava_accel.__main__ import SUMMARIES
from llava_accel.console.verbs import VERBS
from llava_accel.exceptions import UserError
from llava_accel.recipe import dump_recipe, make_recipe
from llava_accel.recipe.toml import to_toml
from llava_accel.runtime import launcher

ROOT = PARITY.parents[1]
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "matplotlib", "numpy")
WITHOUT = f"""
import contextlib, io, json, runpy, sys

def ended(module, *arguments):
    sys.argv = [module, *arguments]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
        else:
            code = 0
    return code, said.getvalue(), [name for name in {HEAVY} if name in sys.modules]

print(json.dumps([ended(*command) for command in json.loads(sys.argv[1])]))
"""


def ended(*commands: list[str]) -> list[tuple[int, str, list[str]]]:
    """Exit code, output, and the heavy libraries that were imported, of each command."""
    job = [sys.executable, "-c", WITHOUT, json.dumps(commands)]
    done = subprocess.run(job, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_verb_is_in_the_list() -> None:
    files = {path.stem for path in (ROOT / "llava_accel").glob("*.py")}
    assert {*VERBS, "prepare"} == set(SUMMARIES) == files - {"__init__", "__main__", "exceptions", "compat", "own_code"}


def test_help_of_every_verb_imports_no_library() -> None:
    commands = [["llava_accel", verb, "--help"] for verb in SUMMARIES]
    commands += [[f"llava_accel.{verb}", "--help"] for verb in SUMMARIES]
    for command, (code, said, heavy) in zip(commands, ended(["llava_accel"], *commands)[1:], strict=True):
        assert (code, heavy) == (0, []), command
        assert "usage: " in said and "example" in said, command


MISTAKES = [
    ("train", "required: RECIPE\n"),
    ("train r.toml --profile nowhere.yaml", "there is no such file"),
    ("train r.toml --num-processes 0", "0 is not a whole number from 1 on"),
    ("evaluate", "name a recipe"),
    ("evaluate --score a.jsonl", "--out FILE.jsonl"),
    ("chat", "--base"),
    ("chat --base b --max-new-tokens 0", "--max-new-tokens: 0 is not a whole number from 1 on"),
    ("chat --base b --web --once What?", "--web takes neither --image nor --once"),
    ("chat --base b --collect a.jsonl", "--collect belongs to --web"),
    ("serve", "--base"),
    ("serve --base b --port 70000", "70000 is not a port. Write one from 1024 to 65535"),
    ("export run --to peft --out a --dry-run", "--push"),
    ("export run --to gguf --out a", "invalid choice"),
    ("report run --out a.html", "comparison"),
    ("train nowhere.toml", "There is no such file"),
    ("check nowhere.toml", "`llava-accel recipes` lists those that ship"),
    ("train run.seed=1 recipes/quickstart.toml", "The recipe comes first"),
    ("plan recipes/quickstart.toml optim.learning_rat=1", "Did you mean optim.learning_rate?"),
    ("train r.toml --learning_rate 1e-4", "write optim.learning_rate=1e-4"),
    ("train recipes/quickstart.toml optim.learning_rate = 1e-4", "Write optim.learning_rate=1e-4"),
    ("train recipes/quickstart.toml data.images=my images", 'Write data.images="my images"'),
    ("init", "--data"),
    ("init --data a.json", "name the recipe to write"),
    ("init new.toml --data a.json --gpu 0", "--gpu: 0 is not the memory of one GPU in GB"),
    ("plan r.toml --gpu nan", "--gpu: nan is not the memory"),
    ("plan r.toml --gpus 0", "--gpus: 0 is not a whole number from 1 on"),
    ("bench r.toml --steps 0", "--steps: 0 is not a whole number from 1 on"),
    ("bench r.toml --rounds -1", "--rounds: -1 is not a whole number from 1 on"),
    ("check r.toml --show -1", "--show: -1 is not a whole number from 0 on"),
    ("recipes show", "recipes show NAME, such as okvqa_qlora"),
    ("recipes quickstart", "recipes show NAME, such as okvqa_qlora"),
    ("recipes show quickstar", "Did you mean quickstart?"),
    ("keys optm", "Did you mean optim?"),
    ("trian", "there is no verb 'trian'. Did you mean train?"),
    ("prepare csv --file nowhere.csv --images . --out a.jsonl", "there is no such file"),
]
PRINTED = ["keys", "recipes", "recipes show quickstart"]


@pytest.fixture(scope="module")
def light() -> dict[str, tuple[int, str, list[str]]]:
    """How these commands ended, in one process: what one imports is there for those behind it."""
    commands = [*PRINTED, *(command for command, _ in MISTAKES)]
    return dict(zip(commands, ended(*(["llava_accel", *command.split()] for command in commands)), strict=True))


@pytest.mark.parametrize(("command", "says"), MISTAKES)
def test_a_mistake_on_the_command_line_imports_no_library(light: dict[str, Any], command: str, says: str) -> None:
    code, said, heavy = light[command]
    assert (code, heavy) == (2, []) and says in said and "Traceback" not in said


@pytest.mark.parametrize("command", PRINTED)
def test_what_is_only_printed_needs_no_library(light: dict[str, Any], command: str) -> None:
    code, said, heavy = light[command]
    assert (code, heavy) == (0, []) and len(said.splitlines()) > 20


@pytest.mark.parametrize(
    ("command", "seconds"), [("train --help", 0.6), ("train r.toml a.b=1", 1.5), ("keys", 0.6), ("recipes", 0.6)]
)
def test_the_answer_takes_little_time(command: str, seconds: float) -> None:
    """Of the processor: the machine may be busy. Twice the promise, for slower ones."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-m", "llava_accel", *command.split()], capture_output=True, cwd=ROOT)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2 * seconds


def test_chat_prompts_before_a_library_is_imported() -> None:
    script = f"import sys, llava_accel.chat; assert not {{*{HEAVY}}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


TO_THE_FIRST_STEP = """
import gc, importlib, sys
from llava_accel.console import command_line

def train_step(*_):
    assert gc.get_freeze_count() > 100_000
    sys.exit(" ".join({"matplotlib", "pandas", "setuptools", "torch._inductor.compile_fx"} & sys.modules.keys()) or 7)

def watched(*names, **keys):
    module = import_module(*names, **keys)
    if module.__name__ == "llava_accel.train":
        module.train_step = train_step
    return module

import_module, importlib.import_module = importlib.import_module, watched
command_line.start("train")
"""


@pytest.mark.slow
def test_the_first_step_waits_for_no_library_that_it_does_not_need(tmp_path: Path) -> None:
    """With an evaluation before it."""
    records = write_records(tmp_path / "data.json", mixed_records(6))
    settings = recipe(tmp_path, records, data={"eval": str(records)}, eval={"at_start": True})
    (tmp_path / "recipe.toml").write_text(dump_recipe(settings))
    job = [sys.executable, "-c", TO_THE_FIRST_STEP, str(tmp_path / "recipe.toml")]
    ended = subprocess.run(job, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 7 and "before training" in ended.stdout, ended.stderr


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(1, 1, 1), (2, 1, 2), (64, 1, 4), (8, 4, 2), (2, 4, 0)])
def test_automatic_workers_are_no_more_than_the_cores(
    cores: int, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    tables = {"run": {"name": "r"}, "model": {"base": "b"}, "data": {"train": "t"}}
    assert make_recipe(tables).data.num_workers == workers
    assert make_recipe(tables | {"data": {"train": "t", "workers": 9}}).data.num_workers == 9


class Started:
    """`llava-accel train` with two processes of launch/ddp.yaml, on a recipe that takes many steps."""

    def __init__(self, folder: Path, data: Path, how: type["subprocess.Popen[str]"], *overrides: str) -> None:
        self.run = folder / "run"
        many = settings(folder, data, train={"epochs": 1000, "per_device_batch_size": 1}, eval={"every": 10**6})
        (folder / "recipe.toml").write_text(to_toml(many))
        command = [sys.executable, "-m", "llava_accel", "train", str(folder / "recipe.toml"), *overrides]
        self.process = how(
            [*command, "--profile", "launch/ddp.yaml", "--num-processes", "2"],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for_steps(self) -> list[psutil.Process]:
        """Wait for the first steps; returns the two processes."""
        file, until = self.run / "metrics.jsonl", time.monotonic() + 240
        while not (file.exists() and '"step": 2' in file.read_text()):
            assert self.process.poll() is None and time.monotonic() < until, self.end()
            time.sleep(0.1)
        return ranks(self.process.pid)

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output


@pytest.fixture
def started(tmp_path: Path, data: Path) -> Iterator[Callable[..., Started]]:
    all_started: list[Started] = []

    def start(*overrides: str, how: type["subprocess.Popen[str]"] = forked.Forked) -> Started:
        all_started.append(Started(tmp_path, data, how, *overrides))
        return all_started[-1]

    # A shell lets what it starts in the background ignore it, and so would all that is started here.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield start
    signal.signal(signal.SIGINT, handler)
    for each in all_started:
        if each.process.poll() is None:
            each.process.terminate()
            each.end()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_to_the_command_saves_and_ends_with_our_line_and_code_and_its_line_is_kept(
    number: signal.Signals, code: int, started: Callable[..., Started]
) -> None:
    training = started("optim.learning_rate=1e-3", how=subprocess.Popen if code == 130 else forked.Forked)
    processes = training.wait_for_steps()
    kept = json.loads((training.run / "environment.json").read_text())["command"]
    profile = "--profile launch/ddp.yaml --num-processes 2"
    assert kept == f"llava-accel train {training.run.parent}/recipe.toml optim.learning_rate=1e-3 {profile}"
    os.killpg(training.process.pid, number)  # as a terminal does
    ended_with, output = training.end()
    assert ended_with == code, output
    assert output.splitlines()[-1].startswith(f"{number.name}: ended at step ")
    assert not [word for word in ("Traceback", "Error", "elastic", "not passed", "warn") if word in output], output
    assert not any(rank.is_running() for rank in processes) and checkpoints(training.run)


@pytest.mark.slow
def test_a_mistake_that_a_process_meets_ends_with_its_message_and_code(started: Callable[..., Started]) -> None:
    code, output = started("data.train=nowhere.json").end()
    assert code == 2 and output.count("error: ") == 1 and "nowhere.json" in output and "Traceback" not in output


@pytest.mark.parametrize("profile", ["", "--profile launch/ddp.yaml"])
def test_more_processes_than_cores_are_not_started(profile: str) -> None:
    command = (
        f"recipes/quickstart.toml data.train=tests data.eval=tests data.images=tests {profile} --num-processes 9999"
    )
    refused = forked.run([sys.executable, "-m", "llava_accel", "train", *command.split()], cwd=ROOT)
    assert refused.returncode == 2 and "--num-processes 9999: this machine has" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_profile_for_more_processes_than_cores_is_refused_by_its_name(tmp_path: Path) -> None:
    profile = tmp_path / "many.yaml"
    profile.write_text((ROOT / "launch" / "ddp.yaml").read_text().replace("num_processes: 8 ", "num_processes: 8888 "))
    with pytest.raises(UserError, match=f"--profile {profile}: num_processes is 8888: this machine has"):
        launcher._profile(Namespace(profile=str(profile), num_processes=None))


@pytest.mark.parametrize("content", ["[run]\nname = 'a'\n", "text", "- 1\n", "\x00", "unknown_key: 1\n"])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "profile.yaml").write_text(content)
    command = (
        f"recipes/quickstart.toml data.train=tests data.eval=tests data.images=tests --profile {tmp_path}/profile.yaml"
    )
    refused = forked.run([sys.executable, "-m", "llava_accel", "train", *command.split()], cwd=ROOT)
    assert refused.returncode == 2 and "it is not a profile of Accelerate's" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_killed_process_is_named(started: Callable[..., Started]) -> None:
    training = started()
    processes = training.wait_for_steps()
    processes[1].kill()
    code, output = training.end()
    assert code == 2 and "error: rank 1 was killed by SIGKILL" in output, output
    assert "elastic" not in output and not any(rank.is_running() for rank in processes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "none"),
    ],
    ids=["nobody has set it", "the user has", "the user has, under its older name"],
)
def test_memory_of_a_gpu_comes_in_blocks_that_grow_unless_the_user_says_otherwise(
    given: dict[str, str], expected: str
) -> None:
    code = "import os, sys, llava_accel; print(os.environ.get('PYTORCH_ALLOC_CONF', 'none'), 'torch' in sys.modules)"
    plain = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", code], env=plain | given, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [expected, "False"], "before torch is there, so before it takes memory"
