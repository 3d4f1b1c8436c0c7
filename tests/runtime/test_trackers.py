"""Trackers get what metrics.jsonl gets, and the run goes on without them."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker
from PIL import Image

import llava_accel.train as verb
from helpers.runs import PARITY, metrics, recipe
from llava_accel.console.output import Console
from llava_accel.recipe import Recipe
from llava_accel.runtime.engines import build_accelerator
from llava_accel.runtime.trackers import Trackers
from llava_accel.setup.run_folder import write_run_files

pytestmark = pytest.mark.slow

TILES = [Image.new("RGB", (40, 52), color) for color in ("red", "green", "blue")]


def tracked(folder: Path, *names: str, **tables: dict[str, Any]) -> Recipe:
    return recipe(folder, log={"trackers": list(names)}, **tables)


def started(settings: Recipe) -> Trackers:
    Path(settings.run.output_dir).mkdir(parents=True, exist_ok=True)
    return Trackers(settings, build_accelerator(settings), Console())


def used(trackers: Trackers) -> None:
    """Two lines and three images, as a run gives them."""
    trackers.log({"loss": 2.5}, 1)
    trackers.log({"eval/loss": 2.25}, 2)
    trackers.images(TILES, 2)
    trackers.close()


def test_tensorboard_has_every_number_of_the_run_its_recipe_and_held_out_images(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = {"eval": str(PARITY / "traj_lora.json")}
    train, evaluation = {"max_steps": 3, "epochs": 3}, {"every": 2, "at_start": True}
    verb.train(tracked(tmp_path, "tensorboard", data=data, train=train, eval=evaluation))
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    lines = metrics(tmp_path / "run")
    losses = [(line["step"], pytest.approx(line["loss"])) for line in lines if "loss" in line]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == losses
    evaluated = [(line["step"], pytest.approx(line["eval"]["loss"])) for line in lines if "eval" in line]
    assert [(event.step, event.value) for event in events.Scalars("eval/loss")] == evaluated
    assert [event.step for event in events.Images("held_out")] == [0, 2, 3]
    (settings,) = (tmp_path / "run" / "tensorboard").glob("*/hparams.yml")
    assert "optim.learning_rate: 0.02" in settings.read_text()


def test_wandb_offline_leaves_numbers_and_images_in_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
    used(started(tracked(tmp_path, "wandb")))
    wandb.teardown()  # waits for wandb's own process, as the end of a run's process does
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    assert b"eval/loss" in log.read_bytes() and b"optim.learning_rate" in log.read_bytes()
    assert len(list((folder / "files" / "media" / "images").rglob("held_out*.png"))) == len(TILES)


def test_trackio_keeps_numbers_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    used(started(tracked(tmp_path, "trackio")))
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [str(row) for row in connection.execute("select * from metrics")]
    assert any("2.5" in row for row in rows) and any("held_out/2" in row for row in rows)


def test_a_tracker_that_cannot_start_is_said_once_and_the_run_ends_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    settings = tracked(tmp_path, "tensorboard", train={"max_steps": 2, "epochs": 2})
    (tmp_path / "run").mkdir()
    write_run_files(settings, build_accelerator(settings))  # else the folder would not be a run's
    (tmp_path / "run" / "tensorboard").write_text("a file where the tracker wants a folder")
    state = verb.train(settings)
    assert state.step == 2 and len(metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "export" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.count("log.trackers: tensorboard failed") == 1


@pytest.mark.parametrize("broken", ["start", "store_init_configuration", "log", "log_images", "finish"])
def test_whatever_a_tracker_raises_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the service is\naway")

    made = type("Broken", (TensorBoardTracker,), {broken: fail})
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", made)
    trackers = started(tracked(tmp_path, "tensorboard"))
    used(trackers)
    assert not trackers.are_there
    said = capsys.readouterr().out
    assert said.count("log.trackers: tensorboard failed") == 1 and "(ConnectionError: the service is away)" in said


def test_one_tracker_that_fails_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noted: list[tuple[dict[str, float], int]] = []

    class Notes(GeneralTracker):
        name, requires_logging_directory, tracker = "aim", False, None

        def __init__(self, run_name: str, **_: object) -> None:
            super().__init__()

        def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
            assert step is not None
            noted.append((values, step))

    settings = tracked(tmp_path, "tensorboard", "aim")
    accelerator = build_accelerator(settings)
    accelerator.log_with = ["tensorboard", "aim"]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "aim", Notes)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    trackers = Trackers(settings, accelerator, Console())
    used(trackers)
    assert noted == [({"loss": 2.5}, 1), ({"eval/loss": 2.25}, 2)]
    assert "log.trackers: aim" not in capsys.readouterr().out


def test_a_tracker_that_is_not_installed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="no supported trackers"):
        trackers = started(tracked(tmp_path, "dvclive"))
    assert "log.trackers: dvclive is not installed" in capsys.readouterr().out
    used(trackers)
