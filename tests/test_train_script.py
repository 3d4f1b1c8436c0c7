"""The real command from recipe to adapter: what it writes, and what it says."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

import llava_accel.train as verb
from helpers.runs import command, losses, metrics, mixed_records, on_tiny, write_records
from llava_accel.recipe import load_recipe
from llava_accel.recipe.toml import to_toml

pytestmark = pytest.mark.slow

STEPS = 6


@pytest.fixture(scope="module")
def qlora(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run folder of a QLoRA run in 4 bits, and what it printed."""
    folder = tmp_path_factory.mktemp("qlora")
    write_records(folder / "train.json", mixed_records(9))
    write_records(folder / "eval.json", mixed_records(5))
    settings = on_tiny(
        llava_folder,
        folder,
        folder / "train.json",
        model={"quantization": {"bits": 4}},
        data={"eval": str(folder / "eval.json")},
        train={"per_device_batch_size": 2, "accumulation_steps": 2, "epochs": 2},
        eval={"at_start": True, "every": 3},
        checkpoint={"every": 3},
    )
    (folder / "recipe.toml").write_text(to_toml(settings))
    done = command(folder / "recipe.toml")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder / "run", done.stdout


def test_a_run_folder_holds_what_other_tools_rely_on(qlora: tuple[Path, str]) -> None:
    run, _ = qlora
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    expected = {"recipe.toml", "environment.json", "metrics.jsonl"}
    expected |= {f"predictions/step-{step:06d}.jsonl" for step in (0, 3, 6)}
    for folder in ("export", "best", "checkpoints/step-000003", "checkpoints/step-000006"):
        names = ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.safetensors")
        names += ("processor_config.json", "tokenizer.json", "chat_template.jinja", "README.md")
        expected |= {f"{folder}/{name}" for name in names}
    assert expected <= files


def test_the_resolved_recipe_repeats_the_run(qlora: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = qlora
    written = tomllib.loads((run / "recipe.toml").read_text())
    assert written["optim"]["betas"] == [0.9, 0.999], "defaults are written out"
    again = load_recipe(
        run / "recipe.toml", [f'run.output_dir="{tmp_path / "again"}"', "eval.at_start=false", "eval.every=100"]
    )
    verb.train(again)
    assert losses(tmp_path / "again") == losses(run)


def test_the_environment_says_what_it_takes_to_repeat_the_run(qlora: tuple[Path, str]) -> None:
    found = json.loads((qlora[0] / "environment.json").read_text())
    # A build for CUDA may name it in torch.__version__ alone: 2.7.0 is installed, and 2.7.0+cu126 imported.
    assert torch.__version__.split("+")[0] == found["packages"]["torch"].split("+")[0]
    assert found["num_processes"] == 1 and found["device"] == "cpu"


def test_metrics_have_a_line_for_every_step_and_evaluation(qlora: tuple[Path, str]) -> None:
    lines = metrics(qlora[0])
    assert [(line["step"], "eval" in line) for line in lines] == [
        (0, True), (1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False), (6, True),
    ]  # fmt: skip
    keys = {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "num_targets",
        "num_tokens",
        "tokens_per_s",
        "seconds",
    }
    assert all(keys <= line.keys() for line in lines if "eval" not in line)
    scores = {"loss", "vqa_accuracy", "exact_match", "num_answers", "blind_vqa_accuracy"}
    assert all(scores <= line["eval"].keys() for line in lines if "eval" in line)
    assert [line["epoch"] for line in lines if "loss" in line] == pytest.approx(
        [step / 3 for step in range(1, 7)], abs=1e-5
    )


def test_the_loss_falls(qlora: tuple[Path, str]) -> None:
    found = [line["eval"]["loss"] for line in metrics(qlora[0]) if "eval" in line]
    assert found[2] < found[1] < found[0] - 0.1


def test_predictions_name_question_answer_and_score(qlora: tuple[Path, str]) -> None:
    lines = (qlora[0] / "predictions" / "step-000006.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(5)]
    assert all({"id", "image", "question", "answers", "prediction", "score"} <= row.keys() for row in rows)
    assert rows[1]["question"] == "What do you see?" and 0 <= rows[1]["score"] <= 1


def test_the_console_says_what_is_trained_and_in_which_types(qlora: tuple[Path, str]) -> None:
    _, text = qlora
    said = " ".join(text.split())
    found = re.search(r"trained LoRA ([\d,]+), projector ([\d,]+): [\d.]+ % of all", said)
    assert found and all(int(number.replace(",", "")) > 0 for number in found.groups())
    assert re.search(r"frozen vision tower [\d,]+, language model [\d,]+", said)
    assert re.search(r"in memory .*[\d,]+ in nf4", said) and "in float32" in said
    assert f"train {STEPS}/{STEPS} loss" in text and "export" in text
    assert "\x1b" not in text, "a pipe is no terminal"
