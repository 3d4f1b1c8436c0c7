"""What is told of a run's data: counts, lengths, commonest answers, and the share of every source."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.runs import PARITY, recipe, talk, write_records
from llava_accel.console.output import Console
from llava_accel.model.processing import load_processing
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.datasets import Part, build_order, open_data
from llava_accel.setup.figures import Mix, figures_of, source_mix


def opened(folder: Path, **data: Any) -> tuple[dict[str, Any], Mix, Part]:
    settings = recipe(folder, data=data)
    processing = load_processing(settings.model, settings.data.image_aspect)
    run = RunContext(settings, build_accelerator(settings), Console(False))
    training, held_out = open_data(run, processing)
    figures = figures_of(settings, training, held_out, build_order(settings, training, 1))
    return figures, source_mix(training), training


def test_records_images_turns_and_lengths_are_those_of_the_data(tmp_path: Path) -> None:
    records = [
        talk(n, "Q", "yes" if n < 3 else f"answer {n} is long", *(["t0.png"] if n % 2 else [])) for n in range(6)
    ]
    data = write_records(tmp_path / "data.json", records)
    figures, _, part = opened(tmp_path, train=str(data), eval=str(PARITY / "traj_lora.json"))
    train = figures["train"]
    assert (train["records"], train["images"], train["without_image"], train["left_out"]) == (6, 1, 3, 0)
    assert train["tokens"]["total"] == int(part.survey.lengths.sum()) and train["turns"]["max"] == 2
    assert sum(train["lengths"]["counts"]) == 6 and train["lengths"]["edges"][-1] == train["tokens"]["max"]
    assert train["common_answers"] == [{"answer": "yes", "records": 3, "share": 0.5}]
    assert figures["eval"]["records"] == 8 and figures["sources"][0]["share"] == 1.0


def test_a_source_is_an_entry_of_the_recipe_and_a_folder_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(3):
        write_records(folder / f"{number}.json", [talk(f"{number}{n}", "Q", "A") for n in range(2)])
    (tmp_path / "other").mkdir()
    twin = write_records(tmp_path / "other" / "0.json", [talk(n, "Q", "B") for n in range(3)])
    sources = [{"path": str(folder), "weight": 0.5}, {"path": str(twin), "weight": 2.0}]
    figures, mix, _ = opened(tmp_path, train=sources)
    assert mix.names == ["many", "0.json"] and mix.of_file == [0, 0, 0, 1]
    assert mix.share_out(np.array([0, 1, 5, 6, 8])).tolist() == [3, 2]
    assert [(each["records"], each["examples"]) for each in figures["sources"]] == [(6, 3.0), (3, 6.0)]
    assert [each["share"] for each in figures["sources"]] == pytest.approx([1 / 3, 2 / 3])


def test_sources_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(str(write_records(tmp_path / name / "train.json", [talk(name, "Q", "A")])))
    _, mix, _ = opened(tmp_path, train=[{"path": path} for path in paths])
    assert mix.names == paths
