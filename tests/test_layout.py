"""The house rules that a reader relies on: a short loop, imports that only point down, small files."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_accel"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {"recipe": 0, "data": 1, "model": 2, "run": 3}  # verbs and the quickstart stand on top
TOP = 4


def train_function() -> ast.FunctionDef:
    tree = ast.parse((PACKAGE / "train.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")


def room(parts: tuple[str, ...]) -> int:
    return ROOMS.get(parts[0], TOP) if parts else TOP


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
        own = room(path.relative_to(PACKAGE).parts[:-1])
        upward += [f"{path.name} -> {'.'.join(target)}" for target in imports(path) if target and room(target) > own]
    assert upward == []


def test_files_are_small() -> None:
    long = {path.name: count for path in FILES if (count := len(path.read_text().splitlines())) > 200}
    assert long == {}
