"""Promises of the recipe: what is accepted, what is written out, and that every complaint helps."""

import json
import sys
import tomllib
import warnings
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_accel.recipe import Recipe, RecipeWarning, changed_keys, dump_recipe, load_recipe, recipe_schema
from llava_accel.recipe.__main__ import main
from llava_accel.recipe.names import KEYS
from llava_accel.recipe.tables import PreferenceTable

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/*.toml"))
SMALLEST = '[run]\nname = "r"\n[model]\nbase = "b"\n[data]\ntrain = "t.jsonl"\n'
# The keys that other tools rely on, with their defaults: the contract, written out a second time on purpose.
CONTRACT = """
run.output_dir="runs/r" run.seed=42 run.precision="auto" run.resume="auto"
model.language_model="" model.vision_tower="" model.projector="" model.train="lora" model.train_projector=true
model.train_vision=false model.adapter="" model.template="v1" model.gradient_checkpointing=false
model.attention="auto" model.compile=false
model.quantization.bits=16 model.quantization.type="nf4" model.quantization.double=true
model.lora.rank=128 model.lora.alpha=256 model.lora.dropout=0.05 model.lora.bias="none"
model.lora.targets="auto" model.lora.variant="lora"
data.images="" data.eval="" data.eval_fraction=0.0 data.max_length=2048 data.on_too_long="error"
data.on_bad_record="error" data.max_bad=0.001 data.image_aspect="auto" data.image_placement="auto"
data.answers="most_frequent" data.labels="answers"
data.share_prefix=false data.shuffle=true data.group_by_length=true data.cache_features="auto" data.cache_dir=""
data.cache_max_gb=50 data.workers="auto"
optim.learning_rate=2e-4 optim.projector_learning_rate=2e-5 optim.vision_learning_rate=2e-6
optim.optimizer="adamw" optim.betas=[0.9,0.999] optim.weight_decay=0.0 optim.schedule="cosine"
optim.warmup_fraction=0.03 optim.max_grad_norm=1.0
train.epochs=1 train.max_steps=0 train.per_device_batch_size=16 train.accumulation_steps=1
train.on_nonfinite="stop" train.max_nonfinite=10 train.spike_factor=0.0
eval.every=0 eval.metric="loss" eval.max_new_tokens=16 eval.limit=0 eval.blind_limit=500 eval.patience=0
checkpoint.every=0 checkpoint.keep=2 checkpoint.best=true log.every=1 log.trackers=[]
""".split()


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST)
    return path


def test_every_key_of_the_contract_exists_with_its_default(smallest: Path) -> None:
    written = tomllib.loads(dump_recipe(load_recipe(smallest)))
    for line in CONTRACT:
        key, value = line.split("=", 1)
        found = written
        for part in key.split("."):
            found = found[part]
        assert found == tomllib.loads(f"v = {value}")["v"], key
    added = {"run.name", "model.base", "data.train", "eval.at_start", "eval.train_limit", "checkpoint.verify"}
    added |= {"model.family", "model.added_tokens", "data.exif", "data.columns", "data.missing_image_mark"}
    added |= {"model.lora.projector", "model.tower_batch", "optim.decay", "run.matmul", "train.loss", "eval.metrics"}
    added |= {"checkpoint.background", "run.deterministic", "train.objective", "data.reader", "model.kernels"}
    added |= {f"preference.{name}" for name in PreferenceTable.model_fields}
    assert {line.split("=")[0] for line in CONTRACT} | added == set(KEYS)


def test_every_key_explains_itself_in_the_schema() -> None:
    tables = json.loads(recipe_schema())["$defs"].values()
    keys = [key for table in tables for key in table["properties"].values() if "$ref" not in key]
    assert len(keys) >= len(KEYS)
    assert all(item["title"] and item["description"] for item in (*keys, *tables))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_without_a_warning_and_say_what_to_expect(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = load_recipe(path)
    jsonschema.validate(tomllib.loads(path.read_text()), json.loads(recipe_schema()))
    text = path.read_text()
    assert recipe.run.name == path.stem
    assert text.startswith("#:schema ../llava_accel/recipe/schema.json\n")
    assert f"recipes/{path.name}" in text
    assert all(f"\n# {word} " in text for word in ("Command", "Hardware", "Time", "Result"))


def test_schema_file_is_current(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["llava_accel.recipe"])
    main()
    printed = capsys.readouterr().out
    assert printed == (ROOT / "llava_accel/recipe/schema.json").read_text()
    jsonschema.Draft202012Validator.check_schema(json.loads(printed))


def test_schema_marks_what_the_loader_refuses() -> None:
    wrong = tomllib.loads(SMALLEST + '[optim]\nlerning_rate = 1\nschedule = "cosin"\nprojector_learning_rate = "x"')
    problems = list(jsonschema.Draft202012Validator(json.loads(recipe_schema())).iter_errors(wrong))
    assert len(problems) == 3


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
NUMBER = st.floats(0, 0.999) | st.just(0)
SOURCE = {"path": TEXT.filter(len)}
SOURCES = st.lists(st.fixed_dictionaries(SOURCE, optional={"images": TEXT, "weight": st.floats(0.1, 9)}), min_size=1)
TRAIN = SOURCE["path"] | SOURCES
VALUES = {
    "run.output_dir": TEXT,
    "run.seed": st.integers(0, 2**32 - 1),
    "model.base": TEXT,
    "model.gradient_checkpointing": st.booleans() | st.integers(1, 10**9),
    "model.quantization.bits": st.sampled_from([4, 8, 16]),
    "model.lora.targets": st.just("auto") | st.just(["a\\.b$", "c"]),
    "data.cache_features": st.just("auto") | st.booleans(),
    "optim.learning_rate": NUMBER,
    "optim.projector_learning_rate": NUMBER | st.sampled_from(["", "null"]),
    "optim.betas": st.tuples(NUMBER, NUMBER).map(list),
    "log.trackers": st.lists(st.sampled_from(["wandb", "tensorboard"])),
}


def nested(flat: dict[str, object]) -> dict[str, object]:
    tables: dict[str, object] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        table: dict = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return tables


@settings(deadline=None)
@given(st.fixed_dictionaries({"data.train": TRAIN}, optional=VALUES))
def test_a_dumped_recipe_loads_as_the_same_recipe(flat: dict[str, object]) -> None:
    recipe = Recipe.model_validate(nested({"run.name": "r"} | flat))
    written = Recipe.model_validate(tomllib.loads(dump_recipe(recipe)))
    assert written == recipe
    assert dump_recipe(written) == dump_recipe(recipe)


def test_null_is_written_out_as_the_number_that_it_stands_for(smallest: Path) -> None:
    for null in ("null", ""):
        recipe = load_recipe(smallest, [f"optim.projector_learning_rate={null}", "optim.learning_rate=3e-4"])
        assert recipe.optim.projector_learning_rate == 3e-4
        assert "projector_learning_rate = 0.0003" in dump_recipe(recipe)


def test_overrides_are_read_as_toml_and_else_as_text(smallest: Path) -> None:
    overrides = ["model.lora.rank=8", "model.base=a b", "log.trackers=['wandb']", "data.images = 1\ny = 2"]
    recipe = load_recipe(smallest, overrides)
    assert (recipe.model.lora.rank, recipe.model.base, recipe.log.trackers) == (8, "a b", ("wandb",))
    assert recipe.data.images == "1\ny = 2"


def test_changed_keys_are_those_that_differ_from_the_defaults(smallest: Path) -> None:
    always = {"run.name": "r", "model.base": "b", "data.train": "t.jsonl"}
    assert changed_keys(load_recipe(smallest)) == always
    changed = {"optim.learning_rate": 1e-3, "model.lora.rank": 8, "run.output_dir": "o"}
    overrides = ["optim.learning_rate=1e-3", "model.lora.rank=8", "run.output_dir=o", "train.epochs=1"]
    assert changed_keys(load_recipe(smallest, overrides)) == always | changed


UNUSED = {
    "model.train=full model.lora.rank=8": "model.lora.rank",
    "model.train=projector optim.learning_rate=1e-3": "optim.learning_rate",
    "model.quantization.bits=8 model.quantization.type=fp4": "model.quantization.type",
    "model.train_projector=false optim.projector_learning_rate=1e-3": "optim.projector_learning_rate",
    "optim.vision_learning_rate=1e-3": "optim.vision_learning_rate",
    "optim.optimizer=sgd optim.betas=[0.5,0.9]": "optim.betas",
    "data.max_bad=0.5": "data.max_bad",
    "data.cache_features=false data.cache_max_gb=1": "data.cache_max_gb",
    "train.max_nonfinite=3": "train.max_nonfinite",
    "train.max_steps=3 train.epochs=2": "train.epochs",
    "eval.every=3": "eval.every",
    "eval.metric=vqa_accuracy checkpoint.best=false": "eval.metric",
}


@pytest.mark.parametrize("overrides", UNUSED)
def test_a_key_without_effect_is_a_warning_also_in_the_resolved_recipe(smallest: Path, overrides: str) -> None:
    with pytest.warns(RecipeWarning) as caught:
        recipe = load_recipe(smallest, overrides.split())
    assert [str(warning.message).split(" = ")[0] for warning in caught] == [UNUSED[overrides]]
    smallest.write_text(dump_recipe(recipe))
    with pytest.warns(RecipeWarning) as again:
        assert load_recipe(smallest) == recipe
    assert [str(warning.message) for warning in again] == [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("name", "stands_for"),
    [("vicuna_v1", "v1"), ("chatml_direct", "chatml"), ("qwen_2", "qwen_1_5"), ("qwen_2_5", "qwen_1_5"), ("v1", "v1")],
)
def test_templates_are_known_by_each_of_llavas_names(smallest: Path, name: str, stands_for: str) -> None:
    assert load_recipe(smallest, [f"model.template={name}"]).model.template == stands_for
