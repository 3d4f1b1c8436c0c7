"""Bases that are not here are planned with the sizes that they were published with."""

from pathlib import Path

import pytest

from llava_accel.advice.known_sizes import published_config, whole_name
from llava_accel.advice.stand_in import known_template, load_configs, with_known_base, write_known
from llava_accel.exceptions import UserError
from llava_accel.model.bases import empty_model
from llava_accel.recipe import make_recipe

WEIGHTS = {
    "llava-1.5-7b-hf": (7.06e9, "v1"),
    "llava-1.5-13b-hf": (13.35e9, "v1"),
    "llava-v1.6-vicuna-7b-hf": (7.06e9, "v1"),
    "llava-v1.6-vicuna-13b-hf": (13.35e9, "v1"),
    "llava-v1.6-mistral-7b-hf": (7.57e9, "mistral_instruct"),
    "llava-v1.6-34b-hf": (34.75e9, "chatml"),
    "llama3-llava-next-8b-hf": (8.36e9, "llava_llama_3"),
    "llava-onevision-qwen2-0.5b-si-hf": (0.90e9, "qwen_1_5"),
    "llava-onevision-qwen2-7b-ov-hf": (8.03e9, "qwen_1_5"),
    "llava-onevision-qwen2-72b-ov-chat-hf": (73.2e9, "qwen_1_5"),
}
"""What their pages on the hub say, and the template of their training."""


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_published_base_has_the_weights_that_are_known_of_it(name: str, tmp_path: Path) -> None:
    assumed = write_known(f"llava-hf/{name}", tmp_path)
    processing = load_configs(str(tmp_path))
    weights, template = WEIGHTS[name]
    found = sum(parameter.numel() for parameter in empty_model(processing.base).parameters())
    assert found == pytest.approx(weights, rel=0.01)
    assert known_template(processing)[0] == template
    assert f"the published sizes of llava-hf/{name}" in assumed


def test_of_any_other_it_is_said_that_its_sizes_are_not_known(tmp_path: Path) -> None:
    assert published_config("else/llava-1.5-7b-hf") is published_config("llava-hf/else") is None
    assumed = write_known("somebody/large", tmp_path)
    assert "those of somebody/large are not known here and may be many times as large" in assumed
    assert load_configs(str(tmp_path)).base.text.hidden_size == 4096


def test_parts_that_make_llava_1_5_are_planned_as_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parts = {"language_model": "lmsys/vicuna-7b-v1.5", "vision_tower": "openai/clip-vit-large-patch14-336"}
    model = {"projector": "runs/mine", "template": "plain", **parts}
    recipe = make_recipe({"run": {"name": "t"}, "model": model, "data": {"train": "x.json"}})
    assert whole_name("", *parts.values()) == "llava-hf/llava-1.5-7b-hf"
    known, assumed = with_known_base(recipe, tmp_path, always=True)
    assert (known.model.base, known.model.language_model, known.model.template) == (str(tmp_path), "", "plain")
    assert assumed.startswith("assumed: the published sizes of llava-hf/llava-1.5-7b-hf")


def test_a_base_that_is_here_is_planned_as_it_is(llava_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe({"run": {"name": "t"}, "model": {"base": str(llava_folder)}, "data": {"train": "x.json"}})
    assert with_known_base(recipe, tmp_path) == (recipe, "") and not list(tmp_path.iterdir())
    missing = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": "./nowhere"})})
    with pytest.raises(UserError, match="there is no folder"):
        with_known_base(missing, tmp_path)
