"""An image that cannot be used is named with its record, never waited for, and never read outside data.images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.broken_images import BROKEN, FINE, noise
from helpers.runs import metrics
from helpers.samples import record
from helpers.verbs import Ended, assert_helpful, assert_refused, start, write_recipe
from llava_accel.data.images import decode

LATE = [name for name, (_, _, says) in BROKEN.items() if "Replace it" in says]
"""Their first bytes promise an image: what is wrong shows when they are decoded."""


def place(folder: Path, name: str) -> str:
    """Make a case in a folder of its own; its name in a record."""
    named, make, _ = BROKEN[name]
    own = folder / name
    (own / "sub").mkdir(parents=True)
    if not (folder / "secret.png").exists():
        noise(8, 8).save(folder / "secret.png")
    make(own / named if "/" not in named else own / named.split("/")[0] / named.rsplit("/", 1)[1])
    return named


def lines(folder: Path, names: list[str]) -> Path:
    """A record for each case, its images in the case's own folder, and a good one."""
    shutil.rmtree(folder / "images", ignore_errors=True)
    noise(20, 10).save(folder / "good.png")
    records = [record("<image>", "A", id="good", image="good.png")]
    for name in names:
        records.append(record("<image>", "A", id=name, image=place(folder / "images", name)))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    return folder / "data.jsonl"


def one(folder: Path, name: str) -> Path:
    """The data of one case, whose folder of images is the case's own."""
    data = lines(folder, [name])
    noise(20, 10).save(folder / "images" / name / "good.png")
    return data


def run(verb: str, folder: Path, name: str, **changes: dict[str, object]) -> Ended:
    data = {"images": str(folder / "images" / name), **changes.pop("data", {})}
    return start(verb, str(write_recipe(folder, one(folder, name), data=data, **changes)))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_a_image(tmp_path: Path, name: str) -> None:
    if name not in LATE:
        ended = run("train", tmp_path, name)
        assert_refused(ended, [f"{tmp_path / 'data.jsonl'}, row 2 (id '{name}')", *BROKEN[name][2]])
        return
    ended = run("check", tmp_path, name)
    assert ended.code == 1 and not ended.messages
    (line,) = [line for line in ended.out.splitlines() if "row 2" in line]
    assert_helpful(line, [f"{tmp_path / 'data.jsonl'}, row 2 (id '{name}')", *BROKEN[name][2]])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_breaks_when_it_is_decoded_ends_the_run_with_its_record(tmp_path: Path, workers: int) -> None:
    ended = run("train", tmp_path, "half a JPEG", data={"workers": workers})
    assert_refused(ended, [f"{tmp_path / 'data.jsonl'}, row 2 (id 'half a JPEG')", "not a readable image"])


def test_what_the_recipe_leaves_out_is_counted_and_listed(tmp_path: Path) -> None:
    names = ["half a JPEG"]
    ended = run("train", tmp_path, *names, data={"on_bad_record": "skip", "max_bad": 1.0})
    assert ended.code == 0, ended.err
    (line,) = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert "(id 'half a JPEG')" in line and metrics(tmp_path / "run")[-1]["num_examples"] == 1


@pytest.mark.parametrize("name", FINE)
def test_broken_input_an_odd_image_is_loaded_as_llava_does(tmp_path: Path, name: str) -> None:
    file, make = FINE[name]
    make(tmp_path / file)
    with Image.open(tmp_path / file) as source:
        expected = np.asarray(source.convert("RGB"))  # LLaVA's own line
    assert np.array_equal(np.asarray(decode(tmp_path / file)), expected)
    if name != "1 x 1":
        assert expected.std() > 0, "the test needs an image with something in it"


def test_check_reads_odd_images_to_the_end(tmp_path: Path) -> None:
    for name, (file, make) in FINE.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / file)
    records = [record("<image>", "A", id=name, image=f"{name}/{file}") for name, (file, _) in FINE.items()]
    (tmp_path / "data.json").write_text(json.dumps(records))
    ended = start("check", str(write_recipe(tmp_path, tmp_path / "data.json", data={"images": ""})))
    assert ended.code == 0 and not ended.messages, ended.out + ended.err
