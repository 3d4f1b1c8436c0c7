"""Who is ahead is said where it is known, and that runs are equal where it is not."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.report_run import write_run
from llava_accel.pages.compare import comparison
from llava_accel.pages.curves import compared_curves
from llava_accel.pages.details import differing_keys
from llava_accel.pages.history import read_run
from llava_accel.pages.write import write_comparison
from llava_accel.setup.run_folder import ENDED


def sentence(*folders: Path) -> str:
    return str(comparison([read_run(folder) for folder in folders])["sentence"]).replace("\u00a0", " ")


def with_scores(folder: Path, scores: list[float], losses: list[float]) -> Path:
    """The run with these scores and losses of its questions at step 50, its only evaluation after the base's."""
    file = folder / "predictions" / "step-000050.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, score, loss in zip(rows, scores, losses, strict=True):
        row |= {"vqa_accuracy": score, "loss": loss}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    means = {"vqa_accuracy": sum(scores) / len(scores), "loss": sum(losses) / len(losses)}
    for line in lines:
        if "eval" in line and line["step"] == 50:
            line["eval"] |= means
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Any:
    def made(name: str, right: int, loss: float = 1.0, metric: str = "vqa_accuracy", of: int = 40) -> Path:
        run = write_run(tmp_path, name=name, num_steps=50, num_questions=of, eval={"metric": metric})
        return with_scores(run, [1.0] * right + [0.0] * (of - right), [loss + 0.01 * (n % 7) for n in range(of)])

    return made


def test_a_difference_within_chance_is_called_equal_with_its_margin(make: Any) -> None:
    # 1 of 40 answers differs: its mean is 2.5 points, and so is its standard error.
    said = sentence(make("one", 20), make("two", 21))
    assert said.startswith("two and one are equal within 5.0 points: VQA accuracy 52.5 %, 50.0 %. That is twice")


def test_a_difference_beyond_chance_is_said_as_before(make: Any) -> None:
    assert (
        sentence(make("one", 20), make("two", 35)) == "two has the highest VQA accuracy, 87.5 %, 37.5 points above one."
    )


def test_three_runs_are_equal_only_to_those_that_are_near_the_first(make: Any) -> None:
    said = sentence(make("one", 5), make("two", 30), make("three", 31))
    assert said.startswith("three and two are equal within 5.0 points") and "one " not in said


def test_equal_scores_need_no_margin(make: Any) -> None:
    assert sentence(make("one", 20), make("two", 20)) == "one and two are equal: VQA accuracy 50.0 %."


def test_runs_without_shared_questions_are_compared_by_their_means(make: Any) -> None:
    one, two = make("one", 20), make("two", 21)
    (two / "predictions" / "step-000050.jsonl").unlink()
    assert sentence(one, two) == "two has the highest VQA accuracy, 52.5 %, 2.5 points above one."


def test_losses_are_compared_by_the_questions_too(tmp_path: Path) -> None:
    runs = []
    for name, losses in (("one", [1.0, 2.0] * 20), ("two", [2.0, 1.001] * 20)):
        run = write_run(tmp_path, name=name, num_steps=50, num_questions=40, eval={"metric": "loss"})
        with_scores(run, [0.0] * 40, losses)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            for score in ("vqa_accuracy", "exact_match"):
                line.get("eval", {}).pop(score, None)
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(run)
    assert sentence(*runs).startswith("one and two are equal within 0.32")


def test_the_state_of_each_run_stands_among_the_numbers(make: Any, tmp_path: Path) -> None:
    runs = [make("ended", 20), make("broken", 20)]
    (runs[0] / ENDED).write_text(json.dumps({"how": "finished", "detail": ""}))
    (runs[1] / ENDED).write_text(json.dumps({"how": "error", "detail": "no room"}))
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert 'class="badge finished">finished' in page
    assert 'class="badge failed">ended by an error at step 50: no room' in page


def test_keys_that_one_recipe_has_alone_are_among_the_differences(tmp_path: Path) -> None:
    columns = {"plain": {}, "named": {"columns": {"image": "photo"}}}
    runs = [read_run(write_run(tmp_path, name=name, num_steps=50, data=data)) for name, data in columns.items()]
    for ordered, values in ((runs, ["not set", '"photo"']), (runs[::-1], ['"photo"', "not set"])):
        assert differing_keys(ordered) == [("data.columns.image", values)]


DPO: dict[str, Any] = {"train": {"objective": "dpo"}, "eval": {"metric": "loss"}}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (DPO, "a mean over pairs"),
        ({**DPO, "preference": {"beta": 0.5}}, "Each run's own"),
        ({"eval": {"metric": "loss"}}, "Each run's own"),
    ],
)
def test_losses_are_named_and_compared_where_they_are_of_one_kind(
    other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    runs = [read_run(write_run(tmp_path, name=name, num_steps=50, **keys)) for name, keys in (("a", DPO), ("b", other))]
    notes = {plot.title: plot.note for plot in compared_curves(runs, ["a", "b"])}
    assert said in notes["Training loss"] and said in notes["Evaluation loss"]
    for run in runs:
        for line in run.evaluations:
            line["eval"] = {"loss": line["eval"]["loss"]}
    is_apart = "with different losses" in str(comparison(runs)["sentence"])
    assert is_apart == (said == "Each run's own")


def test_marks_that_turn_the_direction_are_escaped_in_plots_too(make: Any, plots: None, tmp_path: Path) -> None:
    runs = [make("one", 20), make("two", 21)]
    turned = [run.rename(run.with_name(f"{run.name} \u202e\u200f")) for run in runs]
    for run in turned:
        recipe = run / "recipe.toml"
        recipe.write_text(re.sub(r"(?m)^name = .*", 'name = "same"', recipe.read_text(), count=1))
    page = write_comparison(turned, tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.partition("<svg")[2].count("one \\u202e\\u200f") > 3 and not set("\u202e\u200f") & set(page)
