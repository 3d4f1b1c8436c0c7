"""A short run with all that resuming has to bring back, whole or broken off, and how two such runs are compared."""

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import llava_accel.train as verb
from helpers.runs import Tables, metrics, tables, trained, without_times
from llava_accel.loop import step as step_file
from llava_accel.recipe import make_recipe
from llava_accel.setup.state import seed_step

STEPS = 8
# Windows of 4, 4, 4 and 1 examples in each of two epochs.
NUM_RECORDS, STEPS_PER_EPOCH = 13, 4


class Killed(Exception):
    """Stands for the end of the process."""


def settings(folder: Path, data: Path, /, **changes: Mapping[str, object]) -> Tables:
    """Two epochs with dropout, evaluated and saved at different steps, in `folder / "run"`."""
    base = tables(
        folder,
        data / "train.json",
        model={"lora": {"dropout": 0.2}},
        data={"eval": str(data / "eval.json"), "cache_dir": str(data / "cache")},
        train={"epochs": 2, "per_device_batch_size": 2, "accumulation_steps": 2},
        eval={"at_start": True, "every": 3, "max_new_tokens": 2, "blind_limit": 0},
        checkpoint={"every": 2},
    )
    for table, keys in changes.items():
        base[table] = {**base.get(table, {}), **keys}
    return base


def train(settings: Tables) -> Path:
    """Run to the end; returns the run folder."""
    return Path(settings["run"]["output_dir"]) if verb.train(make_recipe(settings)) else Path()


def train_until(settings: Tables, last: int) -> Path:
    """Run until `last` steps are taken and break off there, without any tidying up."""

    def dying(seed: int, step: int, rank: int) -> None:
        if step == last:
            raise Killed
        seed_step(seed, step, rank)

    with patch.object(step_file, "seed_step", dying), pytest.raises(Killed):
        train(settings)
    return Path(settings["run"]["output_dir"])


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def newest(run: Path) -> Path:
    """The newest checkpoint."""
    return run / "checkpoints" / checkpoints(run)[-1]


def assert_same_run(one: Path, other: Path) -> None:
    """Every logged number and every weight is the same, bit for bit: those of the export, and the last ones."""
    assert without_times(metrics(one)) == without_times(metrics(other))
    for first, second in (
        (trained(place(one)), trained(place(other))) for place in (lambda run: run / "export", newest)
    ):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in second)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: what is written stops in the middle, as on a disk that has filled up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
