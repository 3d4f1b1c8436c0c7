"""Checks that the files and folders of a recipe exist, before anything is loaded: a typing error costs no wait."""

import difflib
import glob
import os
import re
import shlex
from collections.abc import Iterator

from llava_accel.recipe.errors import Problem, RecipeError
from llava_accel.recipe.tables import Recipe

_PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst")
OTHER_SUFFIXES = {
    **dict.fromkeys(
        (".csv", ".tsv"), "Make JSON lines of it: llava-accel prepare csv --file {} --images DIR --out data.jsonl"
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Save it as CSV, and make JSON lines of that: llava-accel prepare csv"),
    **dict.fromkeys(
        (".yaml", ".yml"), 'List what it mixes: train = [{{path = "a.json", weight = 0.5}}, {{path = "b.json"}}]'
    ),
    **dict.fromkeys(_PACKED, "Unpack it, and name what is in it"),
}
"""Suffixes of files that users take for data and that are not read: what to do instead, with a place for the name."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".tar")
"""Suffixes of data files that are read."""


_OF_HUB = re.compile(r"(?:hf:/+|https:/+(?:www\.)?(?:huggingface\.co|hf\.co)/)(?:datasets/)?([\w.-]+/[\w.-]+)/?$")


def is_file_name(path: str) -> bool:
    """Whether a path ends in the suffix of a file, and so is not the name of a data set."""
    return path.lower().endswith((*SUFFIXES, *OTHER_SUFFIXES))


def refuse_missing(recipe: Recipe, source: str) -> None:
    """Raise RecipeError if data, images or a local base do not exist, or the data have a form that is not read."""
    problems: list[Problem] = []
    for key, path, is_folder in _named(recipe):
        suffix = os.path.splitext(path)[1]
        if not (os.path.isdir(path) if is_folder else os.path.exists(path) or _may_be_elsewhere(path)):
            what = f"There is no such {'folder' if is_folder else 'file or folder'}."
            problems.append(Problem({key: path}, what, remedy_of(path, key == "model.base")))
        elif not is_folder and os.path.isfile(path) and (remedy := OTHER_SUFFIXES.get(suffix.lower())):
            what = f"Files ending in {suffix!r} are not read."
            remedy = with_images(remedy.format(shlex.quote(path)), recipe.data.images)
            problems.append(Problem({key: path}, what, f"{remedy}."))
    if problems:
        raise RecipeError(source, problems, recipe)


def with_images(remedy: str, images: str) -> str:
    """A remedy of `OTHER_SUFFIXES` with the folder that the user has named."""
    return remedy.replace("--images DIR --out", f"--images {shlex.quote(images)} --out") if images else remedy


def _named(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """Key, path, and whether it must be a folder."""
    data = recipe.data
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        if isinstance(sources, str):
            yield from [(key, sources, False)] if sources else []
            continue
        for number, each in enumerate(sources):
            yield f"{key}[{number}].path", each.path, False
            yield from [(f"{key}[{number}].images", each.images, True)] if each.images else []
    yield from [("data.images", data.images, True)] if data.images else []
    base = recipe.model.base
    yield from [("model.base", base, True)] if os.path.isfile(base) or not _may_be_of_the_hub(base) else []


def _may_be_elsewhere(path: str) -> bool:
    """Whether a path may be a pattern, or the name of a data set."""
    return path != glob.escape(path) or (_may_be_of_the_hub(path) and "/" in path and not is_file_name(path))


def _may_be_of_the_hub(name: str) -> bool:
    return name.count("/") <= 1 and "\\" not in name and not name.startswith((".", "~", "/"))


def remedy_of(path: str, is_base: bool = False) -> str:
    """What to do about a path that is not there."""
    folder, name = os.path.split(path)
    if (home := os.path.expanduser(path)) != path:
        return f"Only a shell reads ~ as the home folder. Write {home}."
    if "\\" in path and os.sep != "\\":
        return "Write the path that it has on this machine, with / in place of \\."
    if of_hub := _OF_HUB.match(path):
        return f"Write {of_hub[1]}, the name of the data set or model on the hub."
    if re.match(r"\w+:/", path):
        return "Addresses are not read. Download it, and name the file or folder."
    if re.search(r"\{.*\}", path):
        return f"Braces are not read. Write a pattern: {re.sub(r'{.*?}', '*', path)}."
    here = "" if os.path.isabs(path) else f" It was looked for in {os.getcwd()}, where the command was started."
    if folder and not os.path.isdir(folder):
        return f"There is no folder {folder} either. Correct it.{here}"
    if os.path.isfile(path):
        if path.lower().endswith((".tar", *_PACKED)):
            return "It is an archive. Unpack it, and name the folder."
        return (
            "It is a file. Name the folder of a model." if is_base else "It is a file. Name the folder that it is in."
        )
    similar = difflib.get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.75)
    return f"Did you mean {os.path.join(folder, similar[0])}?{here}" if similar else f"Correct it.{here}"
