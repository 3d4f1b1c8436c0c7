"""Errors about data in the words of a verb that has flags in place of a recipe's keys."""

import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import replace

from llava_accel.sources.problems import DataError

_COLUMNS = re.compile(r"data\.columns = (\{.*?\})")


def in_flags(error: DataError, flags: Mapping[str, str]) -> DataError:
    """The error with a verb's flags in place of keys.

    Args:
        flags: Words about keys -> the same for the verb's command line; longer ones first. --columns is known.
    """
    problem, remedy = error.problem, _COLUMNS.sub(_as_flag, error.remedy)
    for key, flag in flags.items():
        problem, remedy = problem.replace(key, flag), remedy.replace(key, flag)
    return replace(error, problem=problem, remedy=remedy)


def _as_flag(columns: re.Match[str]) -> str:
    named = tomllib.loads(f"columns = {columns[1]}")["columns"]
    return f"--columns {shlex.join(f'{ours}={theirs}' for ours, theirs in named.items())}"
