"""Scores that are functions of the user's own: the shipped example, and what goes wrong in such a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import recipe
from llava_accel.console.output import Console
from llava_accel.exceptions import UserError
from llava_accel.loop.machine import print_own_code
from llava_accel.own_code import load_own
from llava_accel.recipe import RecipeError, make_recipe
from llava_accel.scoring.metrics import cell, main_score, measure, score_names, score_title
from llava_accel.scoring.predictions_file import score_file

EXAMPLE = f"{Path(__file__).parents[2] / 'recipes' / 'my_scores.py'}:anls_de"


def row(prediction: str, answer: str, image: str) -> dict[str, Any]:
    return {"prediction": prediction, "answers": {answer: 1.0}, "image": image}


def test_the_shipped_example_is_a_score_like_others() -> None:
    rows = [row("Müller", "Mueller", "a.png"), row("Maier", "Huber", "b.png")]
    found = measure(rows, ["anls", EXAMPLE])
    assert found[EXAMPLE] == 0.5 and rows[0][EXAMPLE] == 1.0 and rows[0]["anls"] == pytest.approx(1 - 2 / 7)
    assert found[f"low_{EXAMPLE}"] == 0.0 and found[f"common_{EXAMPLE}"] == 0.5
    assert score_title(EXAMPLE) == "anls de" and cell(found, EXAMPLE) == "50.0 ± 50.0 %"
    assert score_names(found) == ["anls", EXAMPLE] and main_score("loss", found) == "anls"


def test_a_recipe_names_it_as_a_score_and_as_what_chooses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(tmp_path, data={"eval_fraction": 0.5}, eval={"metrics": ["anls"], "metric": EXAMPLE})
    assert made.eval.measured == ("anls", EXAMPLE)
    print_own_code(made, Console(True))
    assert f"{EXAMPLE} is code of yours, which this process runs (sha256 " in " ".join(capsys.readouterr().out.split())
    with pytest.raises(RecipeError, match="a function in a file such as"):
        make_recipe(
            {"run": {"name": "x"}, "model": {"base": "b"}, "data": {"train": "t"}, "eval": {"metrics": ["f.py"]}}
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no file"),
        ("x = 1", "has no function 'f'"),
        ("def f(:", "line 1: SyntaxError"),
        ("\nimport a_module_that_is_not_there", "line 2: ModuleNotFoundError"),
        ("def f(a, b):\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero, for 'a cat' against"),
        ("def f(a):\n    return 1.0", "TypeError"),
        ("raise SystemExit(0)", "line 1: SystemExit"),
        ("def f(a, b):\n    raise SystemExit", "line 2: SystemExit"),
        ("def f(a, b):\n    return 'good'", "Return a number, higher is better"),
        ("def f(a, b):\n    return float('nan')", "Return a number, higher is better"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line_before_a_weight_is_read(
    tmp_path: Path, text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    made = recipe(tmp_path, eval={"metrics": [f"{tmp_path / 'mine.py'}:f"]})
    with pytest.raises(UserError, match=r"eval\.metrics: ") as raised:
        print_own_code(made, Console(False))
    assert says in str(raised.value)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/mine.py:f", f"{'x' * 300}.py:f", "/dev/null/mine.py:f"])
def test_a_path_that_cannot_be_is_a_file_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=r"eval\.metrics: there is no file .* Correct the path"):
        load_own("eval.metrics", name)


@pytest.mark.parametrize("place", ["base", "base/code", "models--a--b/snapshots/1"])
def test_no_code_in_a_models_folder_is_run(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if place.startswith("base"):
        (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\ndef f(a, b):\n    return 1.0\n")
    (tmp_path / "link.py").symlink_to(folder / "mine.py")
    for file in (folder / "mine.py", tmp_path / "link.py"):
        with pytest.raises(UserError, match=r"no model's code is run.*copy it"):
            load_own("eval.metrics", f"{file}:f")
    assert not (tmp_path / "run").exists()


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    name = f"{tmp_path / 'mine.py'}:f"
    for value in (0.25, 0.75):
        (tmp_path / "mine.py").write_text(f"def f(prediction, references):\n    return {value}\n")
        assert measure([row("a", "a", "x.png")], [name])[name] == value


def test_a_file_of_predictions_is_scored_by_it(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prediction": "Müller", "answers": ["Mueller"]}))
    assert score_file(tmp_path / "p.jsonl", tmp_path / "out.jsonl", [EXAMPLE])[EXAMPLE] == 1.0
