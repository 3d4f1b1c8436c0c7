"""The package as a notebook uses it: five names, lines as they come, and several runs in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.runs import PARITY, metrics, recipe, tables, trained, without_times
from llava_accel.evaluate import evaluate
from llava_accel.exceptions import UserError
from llava_accel.inference.ask import answer, load_trained
from llava_accel.recipe import RecipeError, load_recipe
from llava_accel.runtime.restored import settings_restored
from llava_accel.train import train

ROOT = Path(__file__).parents[1]
NOTEBOOK = """
import json, sys
import llava_accel

heavy = {"torch", "transformers", "accelerate", "pydantic"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert {"load_recipe", "train", "evaluate", "load_trained", "answer"} <= set(dir(llava_accel))
recipe = llava_accel.load_recipe(json.loads(sys.argv[1]), ["train.max_steps=2"])
assert "torch" not in sys.modules
from llava_accel import train
assert train.__name__ == "train" and train is llava_accel.train and "llava_accel.loop.step" in sys.modules
lines = []
state = llava_accel.train(recipe, on_log=lines.append)
assert [line["step"] for line in lines if "loss" in line] == [1, 2] and state.step == 2
found = llava_accel.evaluate(recipe.run.output_dir)
assert found.metrics["loss"] == [line["eval"] for line in lines if "eval" in line][-1]["loss"]
model = llava_accel.load_trained(recipe.run.output_dir)
text = llava_accel.answer(model, sys.argv[2], "What do you see?")
assert text == model.answer(sys.argv[2], "What do you see?") and isinstance(text, str)
# A second run after the others, by the same name: it is the function still, and not the module.
assert llava_accel.train(llava_accel.load_recipe(json.loads(sys.argv[3]))).step == 1
print("done")
"""


@pytest.mark.slow
def test_a_notebook_trains_evaluates_answers_and_trains_again(tmp_path: Path) -> None:
    first = tables(tmp_path / "a", data={"eval_fraction": 0.25})
    full = tables(tmp_path / "b", model={"train": "full", "adapter": ""}, train={"max_steps": 1})
    del full["model"]["lora"]
    words = [json.dumps(first), str(PARITY / "images" / "t0.png"), json.dumps(full)]
    command = [sys.executable, "-W", "error::UserWarning:llava_accel", "-c", NOTEBOOK, *words]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "done", ended.stdout + ended.stderr


def test_lines_come_as_they_are_written_and_belong_to_who_gets_them(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    written: list[int] = []

    def on_log(line: dict[str, Any]) -> None:
        written.append(len(metrics(tmp_path / "run")))
        lines.append(json.loads(json.dumps(line)))
        line.get("eval", line).clear()

    train(recipe(tmp_path, data={"eval_fraction": 0.25}, train={"max_steps": 2}, eval={"every": 1}), on_log=on_log)
    assert lines == metrics(tmp_path / "run") and written == [1, 2, 3, 4]


@pytest.mark.parametrize(("error", "noted"), [(ZeroDivisionError, "error"), (KeyboardInterrupt, "signal")])
def test_what_on_log_raises_ends_the_run_which_can_be_taken_up_again(
    tmp_path: Path, error: type[BaseException], noted: str
) -> None:
    def on_log(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            raise error

    made = recipe(tmp_path, train={"max_steps": 3}, checkpoint={"every": 1})
    with pytest.raises(error):
        train(made, on_log=on_log)
    assert json.loads((tmp_path / "run" / "ended.json").read_text())["how"] == noted
    steps: list[int] = []
    assert train(made, on_log=lambda line: steps.append(line["step"])).step == 3
    assert steps == [2, 3]


def process_wide() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        torch.get_default_dtype(),
        {name: os.environ.get(name) for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")},
    )


def test_runs_follow_one_another_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA in fp32, one that fails, all weights in bf16 and in a fixed order, and LoRA again as if it stood alone."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = process_wide()
    assert train(recipe(tmp_path / "a", train={"max_steps": 2})).step == 2
    with pytest.raises(UserError, match="there is no"):
        train(recipe(tmp_path / "b", Path("nowhere.json"), run={"deterministic": True}))
    assert process_wide() == before
    settings: dict[str, dict[str, Any]] = {
        "run": {"precision": "bf16", "deterministic": True},
        "model": {"train": "full", "adapter": "", "lora": {}},
        "train": {"max_steps": 1},
    }
    ordered: list[bool] = []
    made = recipe(tmp_path / "c", **settings)
    assert train(made, on_log=lambda line: ordered.append(torch.are_deterministic_algorithms_enabled())).step == 1
    assert ordered == [True] and process_wide() == before
    assert train(recipe(tmp_path / "d", train={"max_steps": 2})).step == 2
    assert without_times(metrics(tmp_path / "a" / "run")) == without_times(metrics(tmp_path / "d" / "run"))
    one, other = (trained(tmp_path / name / "run" / "export") for name in ("a", "d"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_settings_are_put_back_after_an_error() -> None:
    before = process_wide()
    with pytest.raises(ZeroDivisionError), settings_restored():
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.benchmark = True
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
        assert 1 / 0
    assert process_wide() == before


def test_a_recipe_may_be_a_mapping_which_stays_as_it_is() -> None:
    given = {"run": {"name": "x"}, "model": {"base": "b"}, "data": {"train": "t"}}
    made = load_recipe(given, ["run.name=y", "optim.betas=0.9,0.95"])
    assert made.run.name == "y" and made.optim.betas == (0.9, 0.95) and given["run"] == {"name": "x"}
    with pytest.raises(RecipeError, match=r"recipe: 1 problem\n.*batch_size"):
        load_recipe({**given, "train": {"batch_size": 1}})


def test_a_run_is_evaluated_and_asked_by_its_folder(tmp_path: Path) -> None:
    made = recipe(tmp_path, data={"eval_fraction": 0.25}, train={"max_steps": 2}, optim={"warmup_fraction": 0.0})
    train(made)
    of_folder = evaluate(str(tmp_path / "run"), tmp_path / "out.jsonl")
    of_file = evaluate(tmp_path / "run" / "recipe.toml")
    assert of_folder.metrics["loss"] != of_file.metrics["loss"]  # trained, and as the recipe starts
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(of_folder.predictions)
    model = load_trained(tmp_path / "run", max_new_tokens=4)
    assert model.notes[0].startswith("weights: ")
    files = [PARITY / "images" / f"t{number}.png" for number in range(2)]
    alone = model.answer(files[0], "What do you see?")
    assert model.answer(files, "What do you see?") is not None
    with Image.open(files[0]) as image:
        assert model.answer(image, "What do you see?") == alone  # and nothing is left of the question before
        assert model.answer(image.convert("CMYK"), "What?") is not None
    assert answer(model, None, "What do you see?") == model.answer([], "What do you see?")
    with pytest.raises(UserError, match=r"there is no image 'nowhere\.png'\. Correct the path"):
        model.answer("nowhere.png", "What?")
    assert model.answer(str(files[0]), "What do you see?") == alone
    with pytest.raises(UserError, match="holds no adapter and no checkpoint"):
        answer(PARITY / "images", None, "What?")
