"""The house rules that a reader relies on: a short loop, rooms whose imports only point down, small files."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from llava_accel.data.tiling import Tiling
from llava_accel.release.verification import compare

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_accel"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = (
    "recipe", "console", "storage", "sources", "data", "converters", "families", "kernels", "model", "runtime", "setup",
    "inference", "scoring", "checkpoint", "estimate", "pages", "release", "loop", "measurement", "inspection", "advice",
)  # fmt: skip
"""From the bottom to the top; the verbs stand on top of all."""
GROUND = ("exceptions", "compat", "own_code")
"""Modules beside the rooms that every room may import."""


def train_function() -> ast.FunctionDef:
    tree = ast.parse((PACKAGE / "train.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")


def floor(parts: tuple[str, ...]) -> int:
    """How high a module stands: -1 for the ground, then the rooms, then the verbs."""
    if parts and parts[0] in GROUND:
        return -1
    return ROOMS.index(parts[0]) if parts and parts[0] in ROOMS else len(ROOMS)


def imports(path: Path) -> set[tuple[str, ...]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {tuple(name.split(".")[1:]) for name in names if name.split(".")[0] == "llava_accel"}
    return found


def depth(node: ast.AST) -> int:
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
    return inner + isinstance(node, blocks)


def stem(name: str) -> str:
    """A module's name without the endings that tell two words of one family apart."""
    for ending in ("ations", "ation", "ator", "ings", "ing", "ers", "er", "ors", "or", "ed", "es", "e", "s"):
        if name.endswith(ending) and len(name) - len(ending) >= 4:
            return name.removesuffix(ending)
    return name


def test_the_loop_is_one_function_of_at_most_60_lines() -> None:
    function = train_function()
    assert function.end_lineno is not None
    assert function.end_lineno - function.lineno + 1 <= 60


def test_the_loop_nests_at_most_3_deep() -> None:
    assert depth(train_function()) <= 3


def test_the_loop_names_no_backend() -> None:
    text = (PACKAGE / "train.py").read_text().lower()
    assert not [word for word in ("deepspeed", "fsdp", "ddp", "zero-", "gloo") if word in text]


def test_imports_only_point_down() -> None:
    assert len(FILES) > 60
    upward = []
    for path in FILES:
        own = path.relative_to(PACKAGE).with_suffix("").parts
        upward += [f"{'/'.join(own)} -> {'.'.join(t)}" for t in imports(path) if t and floor(t) > floor(own)]
    assert upward == []


def test_every_folder_is_a_room_that_says_what_it_is_for() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {*ROOMS, "quickstart"}
    assert all(ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) for room in folders)


def test_no_room_is_a_warehouse() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    for room in ROOMS:
        assert sum(count for path, count in lines.items() if room in path.relative_to(PACKAGE).parts) <= 0.2 * sum(
            lines.values()
        ), room


def test_no_two_modules_have_names_of_one_family() -> None:
    names = [path.stem for path in FILES if not path.stem.startswith("__")]
    stems = [stem(name) for name in names]
    assert [name for name, one in zip(names, stems, strict=True) if stems.count(one) > 1] == []


def test_files_are_small() -> None:
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > 350}
    assert long == {}


def test_types_of_classes_and_of_functions_are_checked_by_the_tests() -> None:
    wrong: Any = "576"
    with pytest.raises(BeartypeCallHintViolation):
        Tiling(336, wrong)
    with pytest.raises(BeartypeCallHintViolation):
        Tiling(336, 576).layout(336, wrong)
    with pytest.raises(TypeCheckError):
        compare(torch.zeros(2, 3), torch.zeros(2, 4))


def test_texts_are_in_utf_8_whatever_the_locale() -> None:
    """What `json.dumps` writes has no other letters than ASCII's, and `json.loads` takes bytes."""
    wrong = [
        path.name for path in FILES if re.search(r"json\.loads\(.*read_text\(\)\)", path.read_text(encoding="utf-8"))
    ]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            is_safe = isinstance(node.args[0], ast.Constant) or "json.dumps" in ast.unparse(node.args[0])
            if node.func.attr == "write_text" and not is_safe and not node.keywords:
                wrong.append(f"{path.name}, line {node.lineno}")
    assert wrong == []
