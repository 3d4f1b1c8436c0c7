"""`llava-accel recipes` finds the recipes that ship, from a clone and from an installation."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers.runs import PARITY
from helpers.verbs import assert_refused, start
from llava_accel import recipes
from llava_accel.data.tiling import Tiling
from llava_accel.families.next import NEXT
from llava_accel.families.onevision import ONEVISION
from llava_accel.recipe import load_recipe

ROOT = PARITY.parents[1]
FILES = sorted((ROOT / "recipes").glob("*.toml"))


def test_all_are_listed_with_what_they_are_for_and_need() -> None:
    ended = start("recipes")
    blocks = ended.out.partition("\n\n")[0].splitlines()
    assert [line for line in blocks if not line.startswith(" ")] == [path.stem for path in FILES]
    assert sum(line.startswith("    Needs ") for line in blocks) == len(FILES) and max(map(len, blocks)) <= 80
    assert "QLoRA nf4 of the tiny LLaVA" in ended.out and "Needs two CPU cores, 2 GB of memory" in ended.out


@pytest.mark.parametrize("name", ["okvqa_qlora", "okvqa_qlora.toml", "recipes/okvqa_qlora.toml"])
def test_one_is_printed_as_it_is(name: str) -> None:
    ended = start("recipes", "show", name)
    assert (ended.code, ended.out) == (0, (ROOT / "recipes/okvqa_qlora.toml").read_text())


def test_an_unknown_one_is_answered_with_the_nearest() -> None:
    assert_refused(start("recipes", "show", "okvqa"), ["recipes show okvqa", "Did you mean okvqa_"])
    assert_refused(start("recipes", "show", "zzz"), ["Name one of dpo_lora, finetune_full"])


def install(folder: Path, declared: list[str]) -> Path:
    """As pip lays it out: the package, its metadata, and the files of `data-files` above both."""
    packages = folder / "lib/python/site-packages"
    metadata = packages / "llava_accel-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-accel\nVersion: 0.1.0\n")
    (place,) = declared
    shutil.copytree(ROOT / "recipes", folder / place, ignore=shutil.ignore_patterns("*.md"))
    lines = [f"../../../{place}/{path.name},," for path in FILES]
    (metadata / "RECORD").write_text("\n".join([*lines, "llava_accel/recipes.py,,", ""]))
    return packages


def test_those_of_an_installation_are_found_where_pip_puts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert [*shipped.values()] == [["recipes/*.toml", "recipes/*.py"]]
    packages = install(tmp_path, [*shipped])
    monkeypatch.setattr(recipes, "__file__", str(packages / "llava_accel/recipes.py"))
    monkeypatch.syspath_prepend(packages)
    found = recipes.shipped()
    assert [*found] == [path.stem for path in FILES]
    assert all(path.is_relative_to(tmp_path) or tmp_path in path.resolve().parents for path in found.values())
    (packages / "recipes").mkdir()  # of another package
    assert [*recipes.shipped()] == [path.stem for path in FILES]


def test_without_any_it_says_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_beside", lambda _: [])
    monkeypatch.setattr(recipes, "_installed", lambda: [])
    assert_refused(start("recipes"), ["no recipes are installed", "Install llava_accel once more"])


@pytest.mark.slow
def test_a_wheel_holds_them(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in ("llava_accel", "recipes", ".github"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run(build, cwd=tree, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    target = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "-q",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([*target, str(wheel)], check=True, capture_output=True)
    code = "from llava_accel.recipes import shipped; print(*shipped())"
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == [path.stem for path in FILES]


TILED = [path for path in FILES if path.stem.startswith(("next_", "onevision_"))]


@pytest.mark.parametrize("path", TILED, ids=lambda path: path.stem)
def test_the_longest_images_of_tiled_bases_fit(path: Path) -> None:
    family, side = (NEXT, 336) if path.stem.startswith("next_") else (ONEVISION, 384)
    patches = (side // 14) ** 2
    tiling = Tiling(side, patches, family.released(side), True, 9 if family is ONEVISION else 0)
    sizes = [(672, 672), (1061, 1296), (2304, 2304)]
    longest = max(tiling.num_tokens(tiling.layout(*size)) for size in sizes)
    assert longest == (2928 if family is NEXT else 8765)
    recipe = load_recipe(path)
    assert recipe.data.max_length >= longest + 1000
    assert recipe.optim.max_grad_norm == 1.0 and recipe.optim.warmup_fraction == 0.03
    if recipe.model.train == "full":
        optim = recipe.optim
        assert recipe.model.train_vision and recipe.model.train_projector
        assert (optim.learning_rate, optim.projector_learning_rate, optim.vision_learning_rate) == (1e-5, 1e-5, 2e-6)
    else:
        assert (recipe.model.lora.rank, recipe.model.lora.alpha) == (128, 256)
