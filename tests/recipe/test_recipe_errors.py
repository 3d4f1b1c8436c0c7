"""Promises of the recipe's errors: everything wrong is said at once. Which keys: tests/helpers/broken_recipes.py."""

import pickle
import time
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_accel.recipe import Recipe, RecipeError, RecipeWarning, load_recipe, make_recipe
from llava_accel.recipe.names import KEYS, OTHER_NAMES
from llava_accel.recipe.toml import to_toml

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
SCALARS = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(["auto", "null", "full"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


@settings(deadline=None, max_examples=80)
@given(st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=4) | VALUES, max_size=4))
def test_whatever_a_file_holds_is_a_recipe_or_a_readable_refusal(tables: dict[str, object]) -> None:
    try:
        assert isinstance(make_recipe(tables), Recipe)
    except RecipeError as error:
        assert error.problems and str(error)
        assert all(problem.given and problem.expected and problem.remedy for problem in error.problems)


TOML_TEXT = st.sampled_from(
    ["", "nan", "-inf", "1e999", "0x1F", "1_0", "07:32:00", "1979-05-27", "1979-05-27T07:32:00Z", "[1, 'a', [true]]",
     "{a = {b = []}}", "'\\u0000'", '"\\u0000"', '"\\u001b[31m"', "9" * 5000, "[" * 3000, "\ud800", "true false"]
) | st.text(max_size=12)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    values=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    overrides=st.lists(st.tuples(st.sampled_from(KEYS) | st.text(max_size=8), TOML_TEXT), max_size=3),
)
def test_any_value_of_any_key_is_a_recipe_or_a_readable_refusal(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object], overrides: list[tuple[str, str]]
) -> None:
    tables = tomllib.loads(SMALLEST)
    for key, value in values.items():
        *parents, name = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(to_toml(tables).encode("utf-8", "surrogateescape"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RecipeWarning)
            assert isinstance(load_recipe(path, [f"{key}={text}" for key, text in overrides]), Recipe)
    except RecipeError as error:
        assert error.problems and str(error).encode()
        assert all(problem.given and problem.expected and problem.remedy for problem in error.problems)


def _seconds(action: Callable[[], object]) -> float:
    """Of this process: the machine may be busy."""
    since = time.process_time()
    action()
    return time.process_time() - since


@pytest.mark.parametrize(
    "content",
    [
        SMALLEST + "".join(f"k{n} = 1\n" for n in range(20_000)),
        SMALLEST + "[more]\n" + "".join(f"k{n} = 1\n" for n in range(20_000)),
        SMALLEST + "".join(f"[t{n}]\n" for n in range(20_000)),
        SMALLEST.replace('"t.jsonl"', "[" + "3," * 25_000 + "]"),
        SMALLEST + "a." * 100_000 + "b = 1\n",
        SMALLEST + "a." * 4000 + "b = 1\n",
        SMALLEST + "k" * 900_000 + " = 1\n",
        SMALLEST + "[model.lora]\ntargets = [" + "'('," * 25_000 + "]",
    ],
    ids=["keys", "keys of a table", "tables", "sources", "a very deep key", "a deep key", "a long key", "patterns"],
)
def test_a_recipe_with_very_much_in_it_is_refused_in_seconds_and_in_few_lines(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.toml").write_text(content)
    said = []
    assert _seconds(lambda: said.append(refusal(tmp_path / "recipe.toml"))) < 7
    assert len(said[0]) < 20_000 and said[0].count("\n") < 200


def test_the_rest_of_many_problems_is_counted(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(SMALLEST + "".join(f"k{n} = 1\n" for n in range(120)))
    said = refusal(tmp_path / "recipe.toml")
    assert said.startswith(f"{tmp_path / 'recipe.toml'}: 120 problems\n") and said.endswith("\nand 70 more")


def test_a_recipe_of_more_than_a_mebibyte_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_bytes(b"#" * (1 << 20) + b"\n")
    assert "at most 1 MiB" in refusal(tmp_path / "recipe.toml")
    (tmp_path / "endless.toml").symlink_to("/dev/zero")
    assert "at most 1 MiB" in refusal(tmp_path / "endless.toml")


def test_a_deep_override_is_refused(smallest: Path) -> None:
    assert "more than 20 deep" in refusal(smallest, "a." * 5000 + "b=1")
