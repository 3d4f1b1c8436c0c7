"""How a run ends where something is wrong: what the user can mend is said once, and nothing bad is saved."""

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import llava_accel.train as verb
from helpers.runs import (
    PARITY,
    losses,
    metrics,
    mixed_records,
    on_tiny,
    recipe,
    tables,
    talk,
    trained,
    write_records,
)
from llava_accel.console.command_line import start
from llava_accel.recipe.toml import to_toml

pytestmark = pytest.mark.slow

# What the user can mend ends with one message and exit code 2.


def test_a_data_error_ends_the_command_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = mixed_records(3)
    records[1]["conversations"] = [{"from": "human", "value": "<image>\nWhat?"}]
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(tables(tmp_path, write_records(tmp_path / "data.json", records))))
    message = _message(capsys, monkeypatch, str(file))
    assert "data.json, row 2 (id 'r1')" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


def _message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What the verb prints on its way to exit code 2."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        start("train")
    text = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in text and text.count("error:") == 1
    return text


def test_recipe_errors_end_the_command_all_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tables(tmp_path, optim={"learning_rat": 1e-3}, train={"epochs": "two"})
    (tmp_path / "recipe.toml").write_text(to_toml(settings))
    text = _message(capsys, monkeypatch, str(tmp_path / "recipe.toml"))
    assert "learning_rat" in text and "optim.learning_rate" in text and "train.epochs" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["model.base", "model.adapter", "model.vision_tower"])
def test_a_missing_model_ends_the_command_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(tables(tmp_path)))
    missing = tmp_path / "nowhere"
    text = _message(capsys, monkeypatch, str(tmp_path / "recipe.toml"), f'{key}="{missing}"')
    assert key in text and str(missing) in text


def test_a_missing_file_ends_the_command_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.toml").write_text(to_toml(tables(tmp_path, tmp_path / "nowhere.json")))
    assert "nowhere.json" in _message(capsys, monkeypatch, str(tmp_path / "recipe.toml"))


# Losses that are not finite.

BAD = "r2"


@pytest.fixture(scope="module")
def poisoned(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that gives no number for a text with the byte 0xA7 in it, and data of which one record has it."""
    folder = tmp_path_factory.mktemp("poisoned")
    shutil.copytree(llava_folder, folder / "base")
    weights = load_file(folder / "base" / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    byte = AutoTokenizer.from_pretrained(folder / "base").convert_tokens_to_ids("<0xA7>")
    weights[name][byte] = math.nan
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    records = [talk(number, "Tell me." if f"r{number}" != BAD else "§ 1", "a word") for number in range(8)]
    write_records(folder / "data.json", records)
    return folder


@pytest.fixture
def run_poisoned(poisoned: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains on the poisoned data, one record a step, and returns the run folder."""

    def go(**train: object) -> Path:
        settings = {"per_device_batch_size": 1, **train}
        keys = on_tiny(poisoned / "base", tmp_path, poisoned / "data.json", train=settings)
        keys["checkpoint"] = {"every": 1, "keep": 100}
        keys["data"]["group_by_length"] = False  # then it does not come first
        return Path(keys["run"]["output_dir"]) if verb.train(recipe(tmp_path, **keys)) else Path()

    return go


def _finite(folder: Path) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in trained(folder).values())


def test_a_loss_that_is_no_number_stops_before_the_update(run_poisoned: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"step \d: .* not finite .*no update was made.*: {BAD} \(all in") as caught:
        run_poisoned()
    step = int(str(caught.value).split(":")[0].removeprefix("step "))
    assert step > 1, "the test needs good steps before the bad one"
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"step-{number:06d}" for number in range(1, step)]
    assert all(_finite(path) for path in saved)
    assert not (tmp_path / "run" / "export").exists()
    line = json.loads((tmp_path / "run" / "nonfinite.jsonl").read_text())
    assert line["ids"] == [BAD] and line["lengths"][0] > 0
    assert line["first"] == "model.language_model.embed_tokens"
    assert f"first in {line['first']};" in str(caught.value)


def test_a_skipped_step_leaves_the_weights_as_they_were(run_poisoned: Callable[..., Path]) -> None:
    run = run_poisoned(on_nonfinite="skip", max_nonfinite=1)
    bad = json.loads((run / "nonfinite.jsonl").read_text())["step"]
    before, after = (trained(run / "checkpoints" / f"step-{step:06d}") for step in (bad - 1, bad))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert _finite(run / "export") and len(losses(run)) == 8
    assert [math.isnan(loss) for loss in losses(run)].count(True) == 1


def test_skipping_ends_at_its_limit(run_poisoned: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"not finite.*{BAD}"):
        run_poisoned(on_nonfinite="skip", max_nonfinite=1, epochs=2)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and steps[0] <= 8 < steps[1]


def test_the_module_whose_weights_have_run_away_is_named(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data.json", mixed_records(8))
    keys = {"optim": {"learning_rate": 1e30}, "train": {"per_device_batch_size": 4, "max_steps": 4}}
    with pytest.raises(
        ValueError, match=r"not finite \(\w+\), first in model\.language_model\.layers\.0\.self_attn\.q_proj"
    ):
        verb.train(recipe(tmp_path, data, **keys))


def test_a_loss_spike_is_reported_with_its_samples_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [talk(number, "Tell me.", "a word") for number in range(24)]
    records[17] = talk(17, "Tell me.", "Ünïcödé zebra 7 ¿?")
    data = write_records(tmp_path / "data.json", records)

    def go(name: str, factor: float) -> Path:
        keys = {
            "train": {"per_device_batch_size": 1, "epochs": 2, "spike_factor": factor},
            "data": {"group_by_length": False},
        }
        verb.train(recipe(tmp_path / name, data, **keys))
        return tmp_path / name / "run"

    watched, plain = go("watched", 1.05), go("plain", 0.0)
    found = [json.loads(line) for line in (watched / "spikes.jsonl").read_text().splitlines()]
    assert found and all(line["ids"] == ["r17"] for line in found)
    assert found[0]["loss"] > 1.05 * found[0]["median"] and found[0]["lengths"][0] > 0
    assert f"note: step {found[0]['step']} has a loss of" in capsys.readouterr().out
    assert losses(watched) == losses(plain) and not (plain / "spikes.jsonl").exists()


# Records that are left out.


def test_records_that_are_left_out_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = mixed_records(5)
    records[2]["conversations"] = [{"from": "gpt", "value": "Who asked?"}]
    data = write_records(tmp_path / "data.json", records)
    for _ in range(2):  # the second start finds the data read
        verb.train(recipe(tmp_path, data, data={"on_bad_record": "skip", "max_bad": 0.5}, run={"resume": "never"}))
        assert "left out: 1 of 5 records (1 roles)" in capsys.readouterr().out
    (line,) = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert "row 3 (id 'r2')" in line
    assert metrics(tmp_path / "run")[0]["num_examples"] == 4


@pytest.fixture
def breaks_later(tmp_path: Path) -> Callable[..., Path]:
    """Reads two records through, breaks the image of one of them, and trains."""
    shutil.copytree(PARITY / "images", tmp_path / "images")
    data = write_records(tmp_path / "data.json", [talk(0, "What?", "a", "t0.png"), talk(1, "What?", "b", "t1.png")])

    def go(**train: object) -> Path:
        keys = tables(tmp_path, data, data={"images": str(tmp_path / "images"), "on_bad_record": "skip"}, train=train)
        verb.train(recipe(tmp_path, **keys))
        whole = tmp_path / "images" / "t1.png"
        Image.open(whole).save(whole, format="PNG")
        whole.write_bytes(whole.read_bytes()[:-40])
        verb.train(recipe(tmp_path, **keys | {"run": keys["run"] | {"resume": "never"}}))
        return tmp_path / "run"

    return go


def test_a_image_that_breaks_during_the_run_is_listed_once(breaks_later: Callable[..., Path]) -> None:
    run = breaks_later(epochs=3)
    assert [line["num_examples"] for line in metrics(run)] == [1, 1, 1]
    (line,) = (run / "skipped.txt").read_text().splitlines()
    assert "t1.png" in line and "r1" in line


def test_a_window_without_a_record_says_so(breaks_later: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"step \d: none of its records could be loaded.*skipped\.txt"):
        breaks_later(per_device_batch_size=1)
