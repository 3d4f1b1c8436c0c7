"""Promises of the recipe's errors: everything wrong is said at once, with key, value and remedy."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_accel.recipe import Recipe, RecipeError, load_recipe, make_recipe
from llava_accel.recipe.keys import KEYS, OTHER_NAMES

SMALLEST = '[run]\nname = "r"\n[model]\nbase = "b"\n[data]\ntrain = "t.jsonl"\n'


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "smallest.toml"
    path.write_text(SMALLEST)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


MESSAGES = {
    "optim.lerning_rate=1": ["optim.lerning_rate = 1", "Did you mean optim.learning_rate?", "under [optim]"],
    "train.learning_rate=1": ["train.learning_rate = 1", "Did you mean optim.learning_rate?", "under [optim]"],
    "lr=1": ["lr = 1", "Did you mean optim.learning_rate?"],
    "quantization.bits=4": ["quantization.bits = 4", "Did you mean model.quantization.bits?"],
    "train.every=4": ["checkpoint.every", "eval.every", "log.every"],
    "model.bas=b": ["model.bas", "Did you mean model.base?"],
    "train.batch_size=4": ["train.batch_size = 4", "Did you mean train.per_device_batch_size?"],
    "model.zzzzzz=1": ["model.zzzzzz = 1", "no such key", "Remove it"],
    'train.epochs="2"': ['train.epochs = "2"', "a whole number", "without quotes", "`epochs = 1`"],
    "train.epochs=1.5": ["train.epochs = 1.5", "a whole number"],
    "train.epochs=true": ["train.epochs = true", "a whole number"],
    "train.epochs=0": ["train.epochs = 0", "at least 1", "`epochs = 1`"],
    "optim.learning_rate=-1": ["optim.learning_rate = -1", "at least 0", "`learning_rate = 0.0002`"],
    "optim.learning_rate=nan": ["optim.learning_rate = nan", "a finite number"],
    "optim.warmup_fraction=1": ["optim.warmup_fraction = 1", "less than 1", "0.03"],
    "optim.schedule=cosin": ['"cosin"', '"cosine", "linear" or "constant"', 'Did you mean "cosine"?'],
    "optim.betas=[0.9]": ["optim.betas[1]", "too short", "all of its values"],
    "data.eval_fraction=1": ["data.eval_fraction = 1", "less than 1"],
    "data.max_length=0": ["data.max_length = 0", "at least 1"],
    "data.cache_features=yes": ['data.cache_features = "yes"', '"auto" or true or false'],
    "data.train=3": ["data.train = 3", "a list of {path, images, weight}"],
    'data.train=[{pth="a"}]': ["data.train[0].pth", "Did you mean path?", 'Add `path = "..."` to data.train[0]'],
    'data.train=[{path="a", weight=0}]': ["data.train[0].weight = 0", "more than 0"],
    "data.train=[]": ["data.train = []", "at least 1"],
    "model.base=3": ["model.base = 3", 'Put it in quotes: `base = "3"`'],
    "model.gradient_checkpointing=0": ["model.gradient_checkpointing = 0", "true or false or at least 1"],
    "model.compile=True": ['model.compile = "True"', "true or false", "without quotes"],
    "model.lora.rank=0": ["model.lora.rank = 0", "at least 1", "`rank = 128`"],
    "model.lora.targets=['(']": ["model.lora.targets[0]", "Not a regular expression", "Correct the pattern"],
    "log.trackers=['wandbb']": ["log.trackers[0]", 'Did you mean "wandb"?'],
    "checkpoint.keep=0": ["checkpoint.keep = 0", "at least 1"],
    "eval=3": ["eval = 3", "a table", "[eval]"],
    "run.precision=fp16": ['run.precision = "fp16"', "loss scaler", '"bf16"', '"fp32"'],
    "run.name=../up": ['run.name = "../up"', "folder", "Choose another name"],
    "train.spike_factor=0.5": ["train.spike_factor = 0.5", "every other step", "above 1"],
    "epochs": ['override = "epochs"', "table.key=value", "optim.learning_rate=1e-4"],
    "data.train.0.path=x": ["data.train.0.path", "no such key"],
}  # fmt: skip


@pytest.mark.parametrize("override", MESSAGES)
def test_a_refusal_names_key_value_and_remedy(smallest: Path, override: str) -> None:
    message = refusal(smallest, override)
    assert message.startswith(f"{smallest}: ")
    assert not [part for part in MESSAGES[override] if part not in message], message


CONFLICTS = {
    "model.language_model=l": ["model.base", "model.language_model"],
    "model.base=''": ["model.base (not set)", "model.language_model", "model.vision_tower"],
    "model.base='' model.language_model=l": ["model.language_model", "model.vision_tower (not set)"],
    "model.base='' model.language_model=l model.vision_tower=v model.train_projector=false":
        ["model.projector", "model.train_projector"],
    "model.train=projector model.train_projector=false": ["model.train", "model.train_projector"],
    "model.train=full model.quantization.bits=4": ["model.train", "model.quantization.bits"],
    "model.lora.variant=pissa model.quantization.bits=8": ["model.lora.variant", "model.quantization.bits"],
    "model.train=full model.adapter=a": ["model.adapter", "model.train", "--to merged"],
    "data.cache_features=true model.train_vision=true": ["data.cache_features", "model.train_vision"],
    "model.attention=flash_attention_2 data.share_prefix=true": ["model.attention", "data.share_prefix"],
    "model.attention=flash_attention_2 run.precision=fp32": ["model.attention", "run.precision"],
    "data.eval=e data.eval_fraction=0.1": ["data.eval", "data.eval_fraction"],
    "eval.metric=vqa_accuracy": ["eval.metric", "data.eval", "data.eval_fraction", "checkpoint.best"],
    "eval.patience=2": ["eval.patience", "data.eval", "data.eval_fraction"],
}  # fmt: skip


@pytest.mark.parametrize("overrides", CONFLICTS)
def test_what_cannot_be_run_together_is_one_problem_that_names_its_keys(smallest: Path, overrides: str) -> None:
    message = refusal(smallest, *overrides.split())
    assert message.startswith(f"{smallest}: 1 problem\n")
    assert not [part for part in CONFLICTS[overrides] if part not in message], message
    assert any(word in message.splitlines()[3] for word in ("Set", "Remove")), message


def test_all_problems_are_said_at_once(smallest: Path) -> None:
    wrong = ["x", "run.name=/", "train.epochs=0", "optim.lr=1"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(smallest, [*wrong, "model.train=full", "model.quantization.bits=4"])
    keys = [tuple(problem.given) for problem in caught.value.problems]
    assert set(keys[:-1]) == {("override",), ("run.name",), ("train.epochs",), ("optim.lr",)}
    assert keys[-1] == ("model.train", "model.quantization.bits")
    assert f"{smallest}: 5 problems" in str(caught.value)


def test_a_key_that_is_wrong_in_itself_is_not_blamed_twice(smallest: Path) -> None:
    wrong = ["model.train=ful", "model.quantization.bits=3", "eval.metric=los", "eval.patience=-1"]
    assert ": 4 problems" in refusal(smallest, *wrong)
    assert ": 1 problem\n" in refusal(smallest, 'data.train=[{path="a", weight=0}]')
    smallest.write_text(SMALLEST.replace("base", "bas"))
    assert ": 1 problem\n" in refusal(smallest)


def test_missing_keys_are_named_with_an_example(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    message = refusal(path)
    for key, table in (("run.name", "run"), ("data.train", "data")):
        assert f"{key} (not set)" in message and f"under [{table}]" in message
    assert "model.base (not set)" in message


def test_a_file_that_cannot_be_read_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "okvqa.toml").write_text("")
    assert f"Did you mean {tmp_path / 'okvqa.toml'}?" in refusal(tmp_path / "okvqaa.toml")
    assert "this is a folder" in refusal(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    assert "Not UTF-8: byte 8" in refusal(tmp_path / "latin.toml")
    (tmp_path / "broken.toml").write_text("[run]\n\nname = okvqa\n")
    message = refusal(tmp_path / "broken.toml")
    assert "line 3" in message and "Correct this line: name = okvqa" in message
    (tmp_path / "open.toml").write_text("[run]\nname = [1,\n")
    assert "the end of the file" in refusal(tmp_path / "open.toml")


def test_a_byte_order_mark_is_no_error(smallest: Path) -> None:
    smallest.write_text(SMALLEST, encoding="utf-8-sig")
    assert load_recipe(smallest).run.name == "r"


def test_what_peft_can_do_is_not_refused(smallest: Path) -> None:
    for variant in ("dora", "olora", "rslora"):
        for bits in (4, 8):
            load_recipe(smallest, [f"model.lora.variant={variant}", f"model.quantization.bits={bits}"])
    load_recipe(smallest, ["model.train=projector", "model.quantization.bits=4"])


def test_names_of_other_programs_lead_to_ours() -> None:
    assert set(OTHER_NAMES.values()) <= set(KEYS)
    for name, key in OTHER_NAMES.items():
        with pytest.raises(RecipeError, match=rf"Did you mean {key}\?"):
            make_recipe({"train": {name: 1}})


def test_a_recipe_cannot_be_changed_after_loading(smallest: Path) -> None:
    recipe = load_recipe(smallest)
    with pytest.raises(ValueError, match="frozen"):
        recipe.optim.learning_rate = 1.0


def test_the_error_crosses_processes(smallest: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(smallest, ["train.epochs=0"])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


NAMES = st.sampled_from([part for key in KEYS for part in key.split(".")]) | st.text(max_size=8)
SCALARS = st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["auto", "null", "full"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=4) | VALUES, max_size=4))
def test_whatever_a_file_holds_is_a_recipe_or_a_readable_refusal(tables: dict[str, object]) -> None:
    try:
        assert isinstance(make_recipe(tables), Recipe)
    except RecipeError as error:
        assert error.problems and str(error)
        assert all(problem.given and problem.expected and problem.remedy for problem in error.problems)
