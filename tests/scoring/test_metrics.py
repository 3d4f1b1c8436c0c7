"""A set of answers: each one's scores, the whole, the interval, and the commonest answer."""

import math
from typing import Any, get_args

import numpy as np
import pytest

from llava_accel.exceptions import UserError
from llava_accel.recipe import make_recipe
from llava_accel.recipe.tables import USUAL_METRICS
from llava_accel.recipe.tables import Metric as Name
from llava_accel.scoring.metrics import (
    METRICS,
    cell,
    check_metric,
    judged,
    main_score,
    measure,
    with_interval,
)
from llava_accel.scoring.vqa import vqa_accuracy


def row(prediction: str, answers: dict[str, float], image: object = None, **fields: Any) -> dict[str, Any]:
    return {"prediction": prediction, "answers": answers, "image": image} | fields


def test_a_recipe_takes_every_metric_and_no_other() -> None:
    assert tuple(get_args(Name)) == tuple(METRICS)
    tables = {"run": {"name": "x"}, "model": {"base": "b"}, "data": {"train": "t"}}
    assert make_recipe(tables).eval.measured == USUAL_METRICS
    chosen = make_recipe(tables | {"eval": {"metrics": ["anls"], "metric": "token_f1"}, "checkpoint": {"best": False}})
    assert chosen.eval.measured == ("anls", "token_f1")


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_best_for_the_right_answer(name: str) -> None:
    texts = ["A", "B", "B"] if name == "multiple_choice" else ["yes it is the red cat", "no", "a dog ran far away"]
    rows = [row(text, {text: 1.0}, image, num_choices=2) for image, text in enumerate(texts)]
    found = measure(rows, [name])
    assert found[name] == pytest.approx(1.0) or (name == "cider" and found[name] > 3)
    assert found[f"low_{name}"] <= found[name] <= found[f"high_{name}"] + 1e-12
    assert all(found[f"common_{name}"] < found[name] and name in each for each in rows)
    assert found[f"low_common_{name}"] <= found[f"common_{name}"] <= found[f"high_common_{name}"] + 1e-12


def test_a_blind_score_has_its_interval_and_no_commonest_answer() -> None:
    rows = [row("yes", {"yes" if number % 4 else "no": 1.0}, number) for number in range(40)]
    seen, blind = measure(rows, ["exact_match", "pope"]), measure(rows, ["exact_match", "pope"], blind=True)
    alone = {key: value for key, value in seen.items() if "common_" not in key}
    ends = {
        key: f"{key[: key.index('_') + 1]}blind_{key.partition('_')[2]}" for key in alone if key[:4] in ("low_", "high")
    }
    assert blind == {ends.get(key, f"blind_{key}"): value for key, value in alone.items()}
    assert cell(blind, "blind_exact_match") == with_interval(blind, "blind_exact_match") == "75.0 ± 13.8 %"


def test_the_interval_is_that_of_the_mean_where_every_image_has_one_question() -> None:
    rows = [row("yes", {"yes" if number % 4 else "no": 1.0}, number) for number in range(400)]
    found = measure(rows, ["exact_match"])
    margin = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found["low_exact_match"] == pytest.approx(0.75 - margin, abs=0.006)
    assert found["high_exact_match"] == pytest.approx(0.75 + margin, abs=0.006)
    assert measure(rows, ["exact_match"]) == found  # the draws are the same every time


def test_questions_on_one_image_are_drawn_together() -> None:
    """Ten questions on each of forty images, right or wrong together, tell no more than forty questions."""
    rows = [row("yes", {"yes" if number // 10 % 4 else "no": 1.0}, f"{number // 10}.png") for number in range(400)]
    alone = [row("yes", {"yes" if number % 4 else "no": 1.0}, f"{number}.png") for number in range(40)]
    together, forty = (measure(each, ["exact_match"]) for each in (rows, alone))
    assert together == pytest.approx(forty)
    without = [each | {"image": []} for each in rows]  # questions without an image stand alone
    found = measure(without, ["exact_match"])
    assert found["high_exact_match"] - found["low_exact_match"] < 0.5 * (
        forty["high_exact_match"] - forty["low_exact_match"]
    )


def test_one_image_has_no_interval_and_no_answer_no_score() -> None:
    assert measure([row("yes", {"yes": 1.0}, "a.png")], ["exact_match"]) == {
        "exact_match": 1.0, "common_exact_match": 1.0,
    }  # fmt: skip
    assert measure([], USUAL_METRICS) == {}


def test_the_commonest_answer_is_scored_as_if_it_were_given_to_every_question() -> None:
    answers = [{"yes": 9.0, "no": 1.0}, {"no": 10.0}, {"Yes": 3.0, "maybe": 7.0}, {"yes": 10.0}]
    found = measure([row("x", each) for each in answers], USUAL_METRICS)
    assert found["common_exact_match"] == 0.75
    assert found["common_vqa_accuracy"] == pytest.approx(sum(vqa_accuracy("yes", each) for each in answers) / 4)
    assert found["common_vqa_accuracy"] == pytest.approx((1 + 0 + 0.9 + 1) / 4, abs=0.03)


def test_only_questions_with_choices_are_scored_by_their_letter() -> None:
    texts = ("A", "B. a magnet", "B", "C", "The answer is B.")
    rows = [row("B", {text: 1.0}, num_choices=3) for text in texts] + [row("cat", {"cat": 1.0})]
    found = measure(rows, USUAL_METRICS)
    assert found["multiple_choice"] == found["common_multiple_choice"] == pytest.approx(3 / 5)
    assert "multiple_choice" not in rows[-1]
    assert "multiple_choice" not in measure(rows[-1:], USUAL_METRICS)


def test_pope_tells_the_share_of_yes() -> None:
    rows = [row("Yes.", {"yes": 1.0}, 0), row("Yes", {"no": 1.0}, 1)]
    found = measure(rows, ["pope"])
    assert found["pope"] == pytest.approx(2 / 3) and found["pope_yes_rate"] == 1.0 and found["pope_accuracy"] == 0.5
    assert [each["pope"] for each in rows] == [1.0, 0.0]


def test_answers_count_as_often_as_annotators_gave_them() -> None:
    assert judged(row("x", {"red": 2.0, "pink": 1.0})).references == ("red", "red", "pink")
    assert judged(row("x", {"red": 0.3})).references == ("red",)


def test_scores_are_shown_in_percent_with_their_margin() -> None:
    measured = {
        "anls": 0.612,
        "low_anls": 0.6,
        "high_anls": 0.63,
        "blind_anls": 0.25,
        "num_answers": 1200.0,
        "loss": 1.5,
    }
    assert with_interval(measured, "anls") == cell(measured, "anls") == "61.2 ± 1.5 %"
    assert [cell(measured, key) for key in ("blind_anls", "num_answers", "loss", "bleu")] == [
        "25.0 %", "1,200", "1.5000", "",
    ]  # fmt: skip


def test_what_people_look_at_first() -> None:
    assert main_score("loss", {"vqa_accuracy", "multiple_choice"}) == "multiple_choice"
    assert main_score("loss", {"exact_match", "vqa_accuracy"}) == "vqa_accuracy"
    assert main_score("loss", {"loss", "cider"}) == "cider"
    assert main_score("anls", {"vqa_accuracy"}) is None


def test_a_metric_that_there_is_not_is_named_with_the_nearest() -> None:
    check_metric("anls", "--metrics")
    with pytest.raises(UserError, match=r"--metrics: there is no metric 'anslr'\. Did you mean anls"):
        check_metric("anslr", "--metrics")


def test_a_draw_without_a_question_that_counts_is_left_out() -> None:
    rows = [row("A", {"A": 1.0}, 0, num_choices=2), row("cat", {"cat": 1.0}, 1)]
    found = measure(rows, ["multiple_choice"])
    assert found["low_multiple_choice"] == found["high_multiple_choice"] == 1.0
    assert not np.isnan(list(found.values())).any()
