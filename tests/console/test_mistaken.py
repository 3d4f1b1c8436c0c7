"""A flag that is none is answered with what to write instead."""

import shlex
from pathlib import Path

import pytest

from llava_accel.console.verbs import read_arguments
from llava_accel.prepare import main as prepare
from llava_accel.recipe import accepts


def said(capsys: pytest.CaptureFixture[str], verb: str, line: str) -> str:
    with pytest.raises(SystemExit) as end:
        read_arguments(verb, shlex.split(line))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "override"),
    [
        ("r.toml --learning_rate 1e-4", "optim.learning_rate=1e-4"),
        ("r.toml --learning-rate 1e-4", "optim.learning_rate=1e-4"),
        ("--learning_rate=1e-4 r.toml", "optim.learning_rate=1e-4"),
        ("r.toml --optim.learning_rate=1e-4 train.epochs=2", "optim.learning_rate=1e-4"),
        ("r.toml --optim.learning_rate 1e-4", "optim.learning_rate=1e-4"),
        ("r.toml -lr 1e-4", "optim.learning_rate=1e-4"),
        ("r.toml --num_train_epochs 3", "train.epochs=3"),
        ("r.toml --eval 'my data.json'", "data.eval='my data.json'"),
        ("r.toml --report_to wandb", "log.trackers=wandb"),
    ],
)
def test_a_flag_that_is_a_key_is_answered_with_the_override(
    capsys: pytest.CaptureFixture[str], line: str, override: str
) -> None:
    flag = next(word for word in line.split() if word.startswith("-")).partition("=")[0]
    message = said(capsys, "train", line)
    assert message.endswith(f"error: there is no flag {flag}. Set the recipe's key: write {override}")
    assert accepts(*shlex.split(override))


@pytest.mark.parametrize(
    ("verb", "line", "says"),
    [
        (
            "train",
            "r.toml --bf16 True",
            "write run.precision=VALUE. `llava-accel keys run.precision` shows what it takes",
        ),
        ("train", "r.toml --bf16", "write run.precision=VALUE"),
        ("train", "r.toml --num_processes 2", "there is no flag --num_processes. Write --num-processes"),
        ("train", "r.toml --profle launch/ddp.yaml", "Did you mean --profile?"),
        ("check", "r.toml --zzz", "`llava-accel keys` lists the keys"),
        ("plan", "r.toml --every 5", "write log.every=5 or eval.every=5 or checkpoint.every=5"),
        ("bench", "r.toml --batch_size 5", "train.per_device_batch_size=5"),
    ],
)
def test_other_flags_are_answered_with_the_nearest(
    capsys: pytest.CaptureFixture[str], verb: str, line: str, says: str
) -> None:
    assert says in said(capsys, verb, line)


@pytest.mark.parametrize(("verb", "line"), [("plan", "-r.toml"), ("report", "-r.toml"), ("chat", "--image -r.toml")])
def test_a_path_that_looks_like_a_flag_is_answered_with_how_to_write_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-r.toml").touch()
    assert said(capsys, verb, line).endswith("Write ./-r.toml")


def test_prepare_says_so_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-images").mkdir()
    with pytest.raises(SystemExit, match="2"):
        prepare(["csv", "--file", "a.csv", "--images", "-images", "--out", "a.jsonl"])
    assert "Write ./-images" in capsys.readouterr().err


def test_flags_and_overrides_may_be_mixed() -> None:
    arguments = read_arguments("plan", ["a.b=1", "--gpu", "24", "c.d=2"])
    assert (arguments.recipe, arguments.overrides, arguments.gpu) == ("a.b=1", ["c.d=2"], 24.0)
