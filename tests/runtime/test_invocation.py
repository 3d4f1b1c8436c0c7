"""The line that is kept of a start is one that a person can paste."""

import sys

import pytest

from llava_accel.runtime import invocation
from llava_accel.runtime.invocation import launcher_words, line_of, typed_line


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/venv/bin/llava-accel", "my run.toml", "a.b=[1, 2]"], "llava-accel train 'my run.toml' 'a.b=[1, 2]'"),
        (["/src/llava_accel/train.py", "r.toml"], "llava-accel train r.toml"),
        (["/src/llava_accel/__main__.py", "r.toml"], "llava-accel train r.toml"),
        (["/src/other/__main__.py", "--x"], "python /src/other/__main__.py --x"),
        (["own_loop.py", "r.toml"], "python own_loop.py r.toml"),
    ],
)
def test_a_process_on_its_own_is_started_by_the_verb(
    argv: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(invocation, "_launcher", lambda: [])
    assert typed_line() == line


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("/venv/bin/python /venv/bin/accelerate launch --num_processes 2 -m llava_accel.train r.toml",
         "accelerate launch --num_processes 2 -m llava_accel.train r.toml"),
        ("/usr/bin/python3 -m accelerate.commands.launch -m llava_accel.train r.toml",
         "python -m accelerate.commands.launch -m llava_accel.train r.toml"),
        ("python /venv/lib/python3/site-packages/accelerate/commands/launch.py -m llava_accel.train r.toml",
         "python -m accelerate.commands.launch -m llava_accel.train r.toml"),
        ("/venv/bin/torchrun --nproc-per-node 2 -m llava_accel.train r.toml",
         "torchrun --nproc-per-node 2 -m llava_accel.train r.toml"),
        ("/bin/bash -c accelerate", ""),
        ("python -m pytest accelerate", ""),
        ("python", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_of_a_launcher_everything_but_the_interpreter_is_kept(words: str, found: str) -> None:
    assert " ".join(launcher_words(words.split())) == found


def test_tokens_are_not_written() -> None:
    words = ["accelerate", "launch", "HF_TOKEN=abc", "hf_abcdefghij", "--wandb_api_key=123456", "eval.max_new_tokens=4"]
    line = line_of([*words, "model.base=a/hf_abcdefghij"])
    assert "abc" not in line and "123456" not in line and "eval.max_new_tokens=4" in line
    assert "HF_TOKEN=..." in line and "hf_..." in line
