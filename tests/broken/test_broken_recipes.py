"""A recipe that cannot be run ends the command before anything is loaded, and says what to change."""

from pathlib import Path

import pytest

from helpers.broken_recipes import COMBINATIONS, FILES, SMALLEST, TOO_MUCH, TYPES, UNKNOWN, VALUES
from helpers.verbs import assert_refused, start


@pytest.fixture
def smallest(tmp_path: Path) -> str:
    (tmp_path / "smallest.toml").write_text(SMALLEST)
    return str(tmp_path / "smallest.toml")


ONE_KEY = UNKNOWN | TYPES | VALUES | TOO_MUCH


@pytest.mark.parametrize("override", ONE_KEY, ids=lambda override: override[:60])
def test_broken_input_a_key(smallest: str, override: str) -> None:
    ended = start("train", smallest, override)
    assert_refused(ended, [smallest, *ONE_KEY[override]])


@pytest.mark.parametrize("overrides", COMBINATIONS)
def test_broken_input_keys_together(smallest: str, overrides: str) -> None:
    ended = start("evaluate", smallest, *overrides.split())
    assert_refused(ended, [f"{smallest}: 1 problem\n", *COMBINATIONS[overrides]])


@pytest.mark.parametrize("name", FILES)
def test_broken_input_a_recipe_file(tmp_path: Path, name: str) -> None:
    content, says = FILES[name]
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    assert_refused(start("train", str(file)), [str(file), *says])


def test_broken_input_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "okvqa.toml").write_text("")
    assert_refused(start("train", str(tmp_path / "okvqaa.toml")), [f"Did you mean {tmp_path / 'okvqa.toml'}?"])


def test_broken_input_a_folder_for_a_recipe(tmp_path: Path) -> None:
    assert_refused(start("train", str(tmp_path)), [str(tmp_path), "this is a folder", "Name one of the .toml files"])


def test_check_says_all_that_is_wrong_with_the_keys_and_looks_at_the_rest(smallest: str, tmp_path: Path) -> None:
    wrong = [key for key in VALUES if not key.startswith("data.")]
    missing, data = tmp_path / "no model", tmp_path / "no data.json"
    ended = start("check", smallest, *wrong, f'model.base="{missing}"', f'data.train="{data}"')
    assert ended.code == 2 and "Traceback" not in ended.err
    recipe, model, file = ended.messages
    assert all(VALUES[key][0] in recipe for key in wrong)
    assert str(missing) in model and str(data) in file
