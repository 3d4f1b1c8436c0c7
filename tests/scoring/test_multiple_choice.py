"""Multiple choice is scored as LLaVA scores ScienceQA: by the letter that an answer names."""

import json
from pathlib import Path

import pytest

import llava_accel.train as verb
from helpers.runs import PARITY, metrics, recipe, write_records
from llava_accel.data.annotations import option
from llava_accel.data.records import parse_record
from llava_accel.pages.history import read_run
from llava_accel.sources.problems import DataError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. a magnet", "B"),
        ("The answer is C.", "C"),
        ("Solids keep their shape. The answer is A.", "A"),
        ("The answer is A. The answer is B.", None),
        ("The answer is A", None),
        ("a", None),
        ("A magnet", None),
        ("A.", None),
        ("D", None),
        ("The answer is E.", None),
        ("", None),
    ],
)
def test_an_option_is_named_by_llavas_rule(text: str, letter: str | None) -> None:
    assert option(text, 3) == letter


def choice(number: int, answer: str, **fields: object) -> dict[str, object]:
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. one\nB. two"}, {"from": "gpt", "value": answer}]
    return {"id": f"q{number}", "image": "t0.png", "conversations": turns, "choices": ["one", "two"]} | fields


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (choice(1, "C. three"), "does not name one of the 2 choices"),
        (choice(1, "two"), "does not name one of the 2 choices"),
        (choice(1, "A", choices=["one"]), "2 to 26 strings"),
        (choice(1, "A", choices="one"), "2 to 26 strings"),
        (choice(1, "A", choices=["one", 2]), "2 to 26 strings"),
    ],
)
def test_choices_that_cannot_be_scored_are_refused(record: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_record(json.dumps(record).encode(), 0)


def test_a_run_is_scored_and_its_best_chosen_by_multiple_choice(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.json", [choice(n, "AB"[n % 2]) for n in range(6)])
    settings = recipe(
        tmp_path,
        data,
        data={"eval": str(data), "images": str(PARITY / "images")},
        train={"epochs": 3, "per_device_batch_size": 6},
        eval={"metric": "multiple_choice", "every": 3, "at_start": True, "max_new_tokens": 2},
    )
    state = verb.train(settings)
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "predictions" / "step-000003.jsonl").read_text().splitlines()]
    expected = sum(option(row["prediction"], 2) == next(iter(row["answers"])) for row in rows) / 6
    last = metrics(run)[-1]["eval"]
    assert last["multiple_choice"] == expected == state.best and last["blind_num_answers"] == 6
    assert {row["multiple_choice"] for row in rows} <= {0.0, 1.0} and rows[0]["score"] == rows[0]["multiple_choice"]
    assert read_run(run).score == "multiple_choice"


def test_a_metric_that_the_data_cannot_give_is_refused_before_training(tmp_path: Path) -> None:
    data = {"eval": str(PARITY / "traj_lora.json")}
    evaluation = {"metric": "multiple_choice", "at_start": True}
    with pytest.raises(ValueError, match='no evaluation record has "choices"'):
        verb.train(recipe(tmp_path, data=data, eval=evaluation))
    assert not (tmp_path / "run" / "checkpoints").exists()
