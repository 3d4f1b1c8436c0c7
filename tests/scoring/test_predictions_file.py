"""Files of predictions: scored line by line, with every error placed, and summed up by type."""

import json
import re
from pathlib import Path

import pytest

from llava_accel.scoring.metrics import TypeScore, by_type
from llava_accel.scoring.predictions_file import score_file


def test_by_type_averages_and_puts_the_most_frequent_type_first() -> None:
    rows = [
        {"score": 1.0, "question_type": "what", "answer_type": "other"},
        {"score": 0.0, "question_type": "how many", "answer_type": "number"},
        {"score": 0.5, "question_type": "how many"},
        {"score": 1, "answer_type": "other"},
        {"question_type": "what"},
    ]
    tables = by_type(rows)
    assert tables == {
        "question_type": {"how many": TypeScore(0.25, 2), "what": TypeScore(1.0, 1)},
        "answer_type": {"other": TypeScore(1.0, 2), "number": TypeScore(0.0, 1)},
    }
    assert list(tables["question_type"]) == ["how many", "what"]
    assert by_type([{"score": 1.0}]) == {}


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_score_file_adds_scores_and_returns_the_means(tmp_path: Path) -> None:
    source = _write(
        tmp_path / "predictions.jsonl",
        '{"id": "q1", "answers": {"roß": 10}, "prediction": "roß"}',
        "",
        '{"id": "q2", "answers": ["a", "b", "c"], "prediction": "B"}',
    )
    out = tmp_path / "scored" / "out.jsonl"
    means = score_file(source, out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {
        "id": "q1",
        "answers": {"roß": 10},
        "prediction": "roß",
        "vqa_accuracy": 1.0,
        "exact_match": 1.0,
        "score": 1.0,
    }
    assert rows[1]["score"] == rows[1]["vqa_accuracy"] == pytest.approx(2 / 9)
    common = {"common_vqa_accuracy": 0.5, "common_exact_match": 0.5}
    between = {"low_vqa_accuracy": 2 / 9, "high_vqa_accuracy": 1.0, "low_exact_match": 1.0, "high_exact_match": 1.0}
    names = ("vqa_accuracy", "exact_match")
    between |= {f"{end}_common_{name}": value for name in names for end, value in (("low", 0.0), ("high", 1.0))}
    whole = {"vqa_accuracy": 11 / 18, "exact_match": 1.0, "count": 2.0}
    assert means == pytest.approx(whole | common | between)


def test_score_file_may_write_over_its_source(tmp_path: Path) -> None:
    source = _write(tmp_path / "p.jsonl", '{"answers": ["a"], "prediction": "b"}')
    assert score_file(source, source)["count"] == 1.0
    assert score_file(source, source)["vqa_accuracy"] == 0.0
    assert json.loads(source.read_text(encoding="utf-8"))["score"] == 0.0
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{oops", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not an object"),
        ('{"answers": ["a"]}', '"prediction" is missing'),
        ('{"answers": ["a"], "prediction": 2}', '"prediction" is missing'),
        ('{"prediction": "a"}', '"answers" is missing'),
        ('{"prediction": "a", "answers": []}', "at least one answer"),
    ],
)
def test_a_line_that_cannot_be_scored_is_named_and_nothing_is_written(tmp_path: Path, line: str, told: str) -> None:
    source = _write(tmp_path / "p.jsonl", '{"answers": ["a"], "prediction": "b"}', line)
    with pytest.raises(ValueError, match=re.escape(told)) as raised:
        score_file(source, tmp_path / "out.jsonl")
    assert f"{source}, line 2: " in str(raised.value)
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_or_empty_file_of_predictions_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.jsonl: there is no such file"):
        score_file(tmp_path / "absent.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="holds no predictions"):
        score_file(_write(tmp_path / "p.jsonl", ""), tmp_path / "out.jsonl")


def test_other_metrics_are_asked_for_by_name(tmp_path: Path) -> None:
    source = _write(
        tmp_path / "p.jsonl",
        '{"answers": ["Harvard"], "prediction": "Havard", "image": "a.png"}',
        '{"answers": ["B"], "prediction": "B", "image": "b.png", "choices": ["x", "y"]}',
    )
    found = score_file(source, tmp_path / "out.jsonl", ["anls", "multiple_choice"])
    assert found["anls"] == pytest.approx((6 / 7 + 1) / 2) and found["multiple_choice"] == 1.0
    assert found["low_anls"] < found["anls"] < found["high_anls"]
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["score"] == first["anls"] and "multiple_choice" not in first and second["multiple_choice"] == 1.0
