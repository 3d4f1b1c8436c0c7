"""What a run writes about itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import llava_accel.train as verb
from helpers.interrupted import train, train_until
from helpers.runs import metrics, mixed_records, recipe, tables, talk, without_times, write_records
from llava_accel.loop.meter import Meter
from llava_accel.setup.figures import Mix
from llava_accel.setup.state import NUM_SUMS
from llava_accel.storage.jsonl import keep_lines_until

pytestmark = pytest.mark.slow

STEPS = 7


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, float]]]:
    """Metric lines of the same run with a line for each step, and with one for every third."""
    folder = tmp_path_factory.mktemp("meter")
    data = write_records(folder / "data.json", mixed_records(9))
    sizes = {"per_device_batch_size": 2, "accumulation_steps": 2, "max_steps": STEPS}
    for every in (1, 3):
        verb.train(recipe(folder / str(every), data, train=sizes, log={"every": every}))
    return {every: metrics(folder / str(every) / "run") for every in (1, 3)}


def test_a_line_covers_all_steps_since_the_last_one(logged: dict[int, list[dict[str, float]]]) -> None:
    assert [line["step"] for line in logged[3]] == [3, 6, 7]
    for line, steps in zip(logged[3], (logged[1][:3], logged[1][3:6], logged[1][6:]), strict=True):
        for count in ("num_targets", "num_tokens", "num_examples"):
            assert line[count] == sum(step[count] for step in steps)
        loss = sum(step["loss"] * step["num_targets"] for step in steps) / line["num_targets"]
        assert line["loss"] == pytest.approx(loss, rel=1e-9)
        assert line["grad_norm"] == steps[-1]["grad_norm"] and line["learning_rate"] == steps[-1]["learning_rate"]


def test_every_example_is_counted_once_an_epoch(logged: dict[int, list[dict[str, float]]]) -> None:
    assert [line["num_examples"] for line in logged[1]] == [4, 4, 1, 4, 4, 1, 4]
    assert [line["epoch"] for line in logged[1]] == pytest.approx([step / 3 for step in range(1, 8)], abs=1e-5)


def test_padding_is_the_share_of_positions_without_a_token(tmp_path: Path) -> None:
    """Two texts of unlike length in a micro-batch, then side by side with a third that fits behind the shorter one."""
    texts = ["a b c d e f g h i j k l m n o p q r s t u v w x y z", "a b", "c d"]
    shares = []
    for number in (2, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        records = [{**talk(n, texts[n] if n else f"{texts[0]} " * 3, "yes")} for n in range(number)]
        verb.train(recipe(folder, write_records(folder / "data.json", records), train={"max_steps": 1}))
        (line,) = metrics(folder / "run")
        shares.append((line["padding"], line["num_tokens"]))
    (loose, tokens), (packed, more) = shares
    longest = tokens / (2 * (1 - loose))
    assert longest == pytest.approx(round(longest), abs=0.01) and 0.2 < loose < 0.5
    assert packed == pytest.approx(1 - more / (2 * longest), abs=1e-4), "two rows hold three texts"


def test_the_speed_is_tokens_by_time(logged: dict[int, list[dict[str, float]]]) -> None:
    for line in logged[1]:
        assert line["tokens_per_s"] == pytest.approx(line["num_tokens"] / line["seconds"], rel=0.02)


def _lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)


@pytest.mark.parametrize(
    ("text", "step", "kept"),
    [
        (_lines(1, 2, 3, 4), 2, _lines(1, 2)),
        (_lines(1, 2), 2, _lines(1, 2)),
        (_lines(1, 2) + '{"step": 3, "lo', 3, _lines(1, 2)),
        (_lines(0, 0, 1), 0, ""),
        ("", 3, ""),
        (_lines(1) + "\n{}\n[]\nnull\n" + '{"step": "2"}\n{"step": 1, "eval": 3}\n' + _lines(2), 3, _lines(1, 2)),
        ("[" * 100_000 + "\n" + _lines(1), 3, _lines(1)),
    ],
    ids=["later", "nothing later", "cut off", "starts anew", "empty", "foreign", "brackets"],
)
def test_lines_of_steps_that_are_taken_again_are_dropped(tmp_path: Path, text: str, step: int, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    keep_lines_until(path, step)
    assert path.read_text() == kept
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_bytes_of_no_text_are_dropped_and_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(_lines(1).encode() + b"\xff\xfe\x80\n" + b"\0" * 30 + b"\n" + _lines(2).encode() + b"\xff")
    said: list[str] = []
    assert keep_lines_until(path, 2, said.append) == 2
    assert path.read_text() == _lines(1, 2)
    assert len(said) == 1 and "3 lines" in said[0] and str(path) in said[0]


def test_evaluations_go_with_the_steps_that_they_are_of(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    evaluations = [json.dumps({"step": step, "eval": {}}) + "\n" for step in (0, 3, 4)]
    path.write_text(evaluations[0] + _lines(1, 2, 3) + evaluations[1] + _lines(4) + evaluations[2])
    keep_lines_until(path, 3)
    assert path.read_text() == evaluations[0] + _lines(1, 2, 3) + evaluations[1]


def test_no_metrics_are_no_reason_to_fail(tmp_path: Path) -> None:
    keep_lines_until(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_examples_of_each_source_are_counted_over_a_resume(tmp_path: Path) -> None:
    files = [write_records(tmp_path / f"{name}.json", mixed_records(count)) for name, count in (("a", 5), ("b", 3))]
    data = {"train": [{"path": str(files[0])}, {"path": str(files[1]), "weight": 2.0}]}
    settings = tables(
        tmp_path, data=data, train={"per_device_batch_size": 2}, log={"every": 4}, checkpoint={"every": 1}
    )
    whole = metrics(train(settings))
    assert [line["step"] for line in whole] == [4, 6]
    for line in whole:
        assert line["num_examples"] == line["num_examples/a.json"] + line["num_examples/b.json"]
    assert [sum(line[f"num_examples/{name}.json"] for line in whole) for name in "ab"] == [5, 6]
    shutil.rmtree(tmp_path / "run")
    train_until(settings, 3)  # between two lines
    assert without_times(metrics(train(settings))) == without_times(whole)


def test_one_source_has_no_count_of_its_own_and_old_sums_are_taken(logged: dict[int, list[dict[str, float]]]) -> None:
    assert not [key for line in logged[1] for key in line if key.startswith("num_examples/")]
    meter = object.__new__(Meter)
    meter._measures = ()
    sums = torch.arange(NUM_SUMS + 3, dtype=torch.float64)
    for mix, kept in ((Mix(["a", "b"], [0, 1], [0, 1]), [*range(NUM_SUMS), 0, 0]), (None, [*range(NUM_SUMS)])):
        meter._mix = mix
        assert meter._of_this_width(sums).tolist() == kept
