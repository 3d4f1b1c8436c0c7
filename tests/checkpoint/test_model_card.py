"""The model card says what was trained, on what and how well, in a form that the hub accepts."""

import json
from pathlib import Path

import pytest
import yaml

from llava_accel.checkpoint.model_card import write_model_card


def test_model_card_says_what_was_trained_and_how_well(
    lora_run: Path, lora_exports: dict[str, Path], llava_folder: Path
) -> None:
    lines = [json.loads(line) for line in (lora_run / "metrics.jsonl").read_text().splitlines()]
    first, last = (line["eval"]["loss"] for line in lines if "eval" in line)
    for place in (lora_run / "best", lora_run / "export", *lora_exports.values()):
        card = (place / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front["library_name"] == ("transformers" if place.name == "merged" else "peft")
        assert "lora" in front["tags"] and "base_model" not in front  # a folder is no model of the hub
        assert f"| {first:.4f} | {last:.4f} |" in card
        assert f"`{llava_folder}`" in card and "`traj_lora.json`" in card and "model.lora.rank = 4" in card
        assert "transformers 5" in card and str(lora_run) not in card


def test_model_card_names_a_base_of_the_hub_and_not_a_folder_that_looks_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    facts = {"base": "llava-hf/llava-1.5-7b-hf", "base_layout": "hub", "train": "lora"}
    write_model_card(tmp_path, "peft", None, facts, title="x")
    front = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert front["base_model"] == facts["base"] and front["base_model_relation"] == "adapter"
    Path(facts["base"]).mkdir(parents=True)
    write_model_card(tmp_path, "peft", None, facts, title="x")
    assert "base_model" not in yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
