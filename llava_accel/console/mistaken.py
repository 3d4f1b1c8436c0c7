"""Guesses what was meant by a flag that a verb does not have: another flag, or a key of the recipe."""

import argparse
import difflib
import os
import re
import shlex
from collections.abc import Iterable, Sequence


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a verb that takes overrides, which may come between its flags.

    Raises:
        SystemExit: a usage error; for a flag that does not exist, it names the override to write instead.
    """
    arguments, unknown = parser.parse_known_intermixed_args(words)
    flag = next((word for word in unknown if word.startswith("-")), None)
    if flag is not None:
        parser.error(advice(flag, words, re.findall(r"--[a-z][\w-]*", parser.format_usage())))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return arguments


def refuse_paths_with_a_dash(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End with a usage error if a word that would be read as a flag is the path of a file or folder."""
    for word in words:
        if re.match(r"-\w", word) and os.path.lexists(word):
            problem = f"{word} is a file or folder, but what begins with a dash is read as a flag"
            parser.exit(2, f"{parser.prog}: error: {problem}. Write ./{word}\n")  # no usage: it has no arguments yet


def advice(flag: str, words: Sequence[str], flags: Iterable[str]) -> str:
    """A sentence that says what is wrong with a flag, and what to write instead.

    Args:
        words: The command line that it is in.
        flags: The flags that the verb has.
    """
    # Here, because pydantic takes as long as all of a verb's help.
    from llava_accel.recipe import accepts
    from llava_accel.recipe.names import KEYS, nearest_keys

    known = list(flags)
    name, _, value = flag.lstrip("-").partition("=")
    shown = f"there is no flag {flag.partition('=')[0]}"
    if (spelling := f"--{name.replace('_', '-')}") in known:
        return f"{shown}. Write {spelling}"
    key = name.replace("-", "_")
    keys = (key,) if key in KEYS else nearest_keys(key)
    if not keys:
        near = difflib.get_close_matches(f"--{name}", known, n=1)
        hint = f"Did you mean {near[0]}?" if near else "`llava-accel keys` lists the keys"
        return f"{shown}. {hint} Keys of the recipe are set as table.key=value, such as optim.learning_rate=1e-4"
    value = value or _next_word(flag, words)
    if all(accepts(f"{each}={value}") for each in keys):
        return f"{shown}. Set the recipe's key: write {_either(f'{each}={shlex.quote(value)}' for each in keys)}"
    written = _either(f"{each}=VALUE" for each in keys)
    return f"{shown}. Set the recipe's key: write {written}. `llava-accel keys {keys[0]}` shows what it takes"


def _next_word(flag: str, words: Sequence[str]) -> str:
    after = [*words, ""][list(words).index(flag) + 1] if flag in words else ""
    return "" if after.startswith("--") or "=" in after else after


def _either(texts: Iterable[str]) -> str:
    return " or ".join(texts)
