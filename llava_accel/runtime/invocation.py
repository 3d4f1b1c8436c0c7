"""The line that started this run, as a person can type it again."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

VARIABLE = "LLAVA_ACCEL_STARTED_WITH"
"""Environment variable by which `llava-accel train --profile` tells its processes what the user typed."""

_OWN = ("train.py", "llava-accel", "__main__.py")
_LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed")
_MODULES = ("accelerate.commands.launch", "torch.distributed.run")
_SECRETS = re.compile(r"\b(hf|ghp|gho|github_pat|sk|wandb_v1)([_-])\w{6,}")
_NAMED_SECRETS = re.compile(r"(?i)\b(\w*(?:api_?key|token|secret|password))=\S+")


def typed_line() -> str:
    """The command, quoted for a shell, with tokens masked: it is written to files."""
    return os.environ.get(VARIABLE) or line_of(_launcher() or _own(sys.argv))


def line_of(words: Sequence[str]) -> str:
    """These words as one line."""
    masked = (_SECRETS.sub(r"\1\2...", _NAMED_SECRETS.sub(r"\1=...", word)) for word in words)
    return shlex.join(masked)


def _own(argv: Sequence[str]) -> list[str]:
    """The command of this process, if no launcher started it."""
    name = Path(argv[0]).name
    is_ours = name in _OWN[:2] or (name == _OWN[2] and Path(argv[0]).parent.name == "llava_accel")
    return ["llava-accel", "train", *argv[1:]] if is_ours else ["python", *argv]


def _launcher() -> list[str]:
    """The command of the launcher that started this process; empty if none did."""
    if not any(name.startswith("ACCELERATE_") or name == "LOCAL_RANK" for name in os.environ):
        return []
    try:
        words = psutil.Process().parent().cmdline()  # pyright: ignore[reportOptionalMemberAccess]  a process here has one
    except (psutil.Error, AttributeError):
        return []
    return launcher_words(words)


def launcher_words(words: Sequence[str]) -> list[str]:
    """The command line of a process from its launcher on, without the interpreter; empty if it is not a launcher's."""
    is_python = bool(words) and Path(words[0]).name.startswith("python")
    rest = list(words[is_python:])
    if is_python and rest[:1] == ["-m"]:
        return ["python", *rest] if rest[1:2] and rest[1] in _MODULES else []
    if not rest:
        return []
    if Path(rest[0]).name in _LAUNCHERS:
        return [Path(rest[0]).name, *rest[1:]]
    module = next((one for one in _MODULES if rest[0].endswith(f"/{one.replace('.', '/')}.py")), None)
    return ["python", "-m", module, *rest[1:]] if is_python and module else []
