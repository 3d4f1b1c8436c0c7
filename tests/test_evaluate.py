"""What `evaluate` says before it works for long, and about the base that it works on."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helpers.runs import PARITY, tables
from helpers.verbs import start
from llava_accel.recipe.toml import to_toml


def write_recipe(folder: Path) -> str:
    """A recipe whose base is missing: whatever comes before that was said before any work."""
    folder.joinpath("r.toml").write_text(to_toml(tables(folder, model={"base": str(folder / "nowhere")})))
    return str(folder / "r.toml")


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("folder", "is a folder. Name a file in it, such as"),
        ("a_file/predictions.jsonl", "cannot be written (Not a directory). Name a file in another folder"),
        ("/proc/predictions.jsonl", "--out /proc/predictions.jsonl cannot be written"),
        ("x" * 300, "cannot be written (File name too long)"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_any_work(tmp_path: Path, out: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a_file").touch()
    ended = start("evaluate", write_recipe(tmp_path), "--out", str(tmp_path / out))
    assert ended.code == 2 and len(ended.messages) == 1 and said in ended.messages[0], ended.err
    scored = tmp_path / "scored.jsonl"
    scored.write_text(json.dumps({"answers": ["a"], "prediction": "a"}) + "\n")
    ended = start("evaluate", "--score", str(scored), "--out", str(tmp_path / out))
    assert ended.code == 2 and said in ended.messages[0], ended.err


def test_a_file_in_a_new_folder_is_written_and_nothing_is_left_by_the_trial(tmp_path: Path) -> None:
    scored, out = tmp_path / "scored.jsonl", tmp_path / "new" / "folder" / "out.jsonl"
    scored.write_text(json.dumps({"answers": ["a"], "prediction": "a"}) + "\n")
    assert start("evaluate", "--score", str(scored), "--out", str(out)).code == 0
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl"]
    ended = start("evaluate", write_recipe(tmp_path), "--out", str(tmp_path / "other" / "out.jsonl"))
    assert "nowhere" in ended.messages[0] and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_base_that_the_adapter_was_not_trained_on_is_said_and_its_own_is_not(
    lora_run: Path, llava_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(llava_folder, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file(weights | {name: weights[name] + 0.01}, other / "model.safetensors", metadata={"format": "pt"})
    data = f'data.eval="{PARITY / "traj_lora.json"}"'
    words = [str(lora_run / "recipe.toml"), "--adapter", str(lora_run), data]
    said = start("evaluate", *words, f'model.base="{other}"')
    assert said.code == 0 and "was trained on a base with the fingerprint" in said.out, said.err
    assert f"and {other} has" in said.out
    own = start("evaluate", *words)
    assert own.code == 0 and "fingerprint" not in own.out


def test_metrics_of_a_file_are_named_as_in_a_recipe(tmp_path: Path) -> None:
    scored, out = tmp_path / "scored.jsonl", tmp_path / "out.jsonl"
    scored.write_text(json.dumps({"answers": ["Harvard"], "prediction": "Havard"}) + "\n")
    assert start("evaluate", "--score", str(scored), "--out", str(out), "--metrics", "anls").code == 0
    assert json.loads(out.read_text())["anls"] == pytest.approx(6 / 7)
    ended = start("evaluate", "--score", str(scored), "--out", str(out), "--metrics", "anl")
    assert ended.code == 2 and "Did you mean anls" in ended.messages[0]
    ended = start("evaluate", "recipe.toml", "--metrics", "anls")
    assert ended.code == 2
