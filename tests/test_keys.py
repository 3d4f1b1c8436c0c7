"""`llava-accel keys` says what every key takes, in lines that a terminal of 80 columns holds."""

import pytest

from helpers.verbs import assert_refused, start
from llava_accel.recipe.names import DEFAULTS, KEYS
from llava_accel.recipe.toml import toml_value


def said(*words: str) -> str:
    ended = start("keys", *words)
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def test_every_key_is_there_with_its_default() -> None:
    lines = said().splitlines()
    assert max(map(len, lines)) <= 80
    keys = [line.strip() for line in lines if line.startswith("  ") and line[2] != " "]
    given = {key: default for key, _, default in (line.partition(" = ") for line in keys)}
    assert {*KEYS} <= {*given}
    for key in ("optim.betas", "model.lora.targets", "data.cache_max_gb", "log.trackers", "run.seed"):
        assert given[key] == toml_value(DEFAULTS[key])
    assert given["run.name"] == "" and "      text, required" in lines


@pytest.mark.parametrize("name", ["optim", "[optim]"])
def test_a_table_is_shown_alone(name: str) -> None:
    text = said(name)
    assert (
        text.startswith("[optim] Optimizer and schedule") and "optim.weight_decay = 0.0\n      number from 0\n" in text
    )
    assert "train.epochs" not in text


def test_a_table_brings_its_tables_and_a_key_stands_alone() -> None:
    assert {"[model]", "[model.quantization]", "[model.lora]"} <= {
        line.partition(" ")[0] for line in said("model").splitlines()
    }
    assert said("data.train").count("[[data.train]] One source") == 1
    assert said("model.lora.rank").splitlines()[:2] == ["  model.lora.rank = 128", "      integer from 1 to 65536"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("optm", "Did you mean optim?"),
        ("learning_rate", "Did you mean optim.learning_rate?"),
        ("lora_r", "Did you mean model.lora.rank?"),
        ("qqqq", "Name one of run, model, "),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, says: str) -> None:
    ended = start("keys", name)
    assert_refused(ended, [f"keys {name}: there is no such table and no such key", says])
    if "mean" in says:
        assert said(says.removeprefix("Did you mean ").removesuffix("?"))
