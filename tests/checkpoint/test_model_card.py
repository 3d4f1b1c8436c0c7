"""The model card says what was trained, on what and how well, in a form that the hub accepts."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from llava_accel.checkpoint.model_card import write_model_card
from llava_accel.recipe import make_recipe


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


@pytest.mark.parametrize("name", ["a`b.json", "``.json", "`", "a\nb ## c.json", "a```b.json", "plain.json"])
def test_a_files_name_stays_code_whatever_is_in_it(tmp_path: Path, name: str) -> None:
    recipe = make_recipe({"run": {"name": "run"}, "model": {"base": "b"}, "data": {"train": name, "eval": name}})
    write_model_card(tmp_path, "checkpoint", recipe, {"base": f"b{name}", "base_layout": "hub", "train": "lora"})
    shown = name.replace("\n", "\\n")
    card = (tmp_path / "README.md").read_text()
    spans = [
        token.content
        for block in MarkdownIt().parse(card)
        for token in block.children or []
        if token.type == "code_inline"
    ]
    assert spans.count(shown) == 2 and f"b{shown}" in spans
    code = next(block.content for block in MarkdownIt().parse(card) if block.type == "fence" and block.info == "python")
    compile(code, "card", "exec")


def test_commands_of_the_card_take_a_base_with_spaces_and_quotes(tmp_path: Path) -> None:
    facts = {"base": "my models/it's", "base_layout": "original", "train": "lora"}
    write_model_card(tmp_path, "peft", None, facts, title="x")
    (line,) = [
        line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("llava-accel export")
    ]
    assert shlex.split(line) == ["llava-accel", "export", facts["base"], "--to", "merged", "--out", "it's-hf"]


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_the_code_of_the_card_turns_images_as_training_did(tmp_path: Path, exif: str) -> None:
    recipe = make_recipe({"run": {"name": "run"}, "model": {"base": "b"}, "data": {"train": "t", "exif": exif}})
    write_model_card(tmp_path, "checkpoint", recipe, {"base": "b", "base_layout": "hub", "train": "lora"})
    assert ("ImageOps.exif_transpose(Image.open" in (tmp_path / "README.md").read_text()) == (exif == "apply")
