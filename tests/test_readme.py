"""The pages that a user reads: short enough, and naming only what exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_accel.data.records import parse_record
from llava_accel.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "launch/README.md",
    "recipes/README.md",
    "tests/bench/README.md",
    "llava_accel/quickstart/base/README.md",
]
PAGES += [f".github/{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "NOTICES", "SECURITY")]
MOST_WORDS = 1600
MOST_BYTES = 250_000  # of the picture: every visit of the page loads it


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS
    assert 0 < (ROOT / ".github/report.png").stat().st_size <= MOST_BYTES


def named_files(page: Path) -> set[Path]:
    """Relative links and images, and what starts like a path of this repository."""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text) + re.findall(r'<img src="([^"]+)"', text)
    paths = re.findall(r"(?<![\w./~-])((?:launch|recipes|tests|llava_accel|\.github)/[\w./-]*\w)", text)
    return {(page.parent / link).resolve() for link in links} | {ROOT / path for path in paths}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = named_files(ROOT / page)
    assert named or page.endswith("CHANGELOG.md")
    assert sorted(str(path.relative_to(ROOT)) for path in named if not path.exists()) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_names_exists(page: str) -> None:
    text, package = (ROOT / page).read_text(), ROOT / "llava_accel"
    verbs = re.findall(r"llava-accel ([a-z]+)", text)
    modules = re.findall(r"-m llava_accel\.([a-z_]+)", text)
    assert [verb for verb in verbs if not (package / f"{verb}.py").is_file()] == []
    assert [name for name in modules if not {f"{name}.py", name} & {path.name for path in package.iterdir()}] == []


def test_the_readme_names_every_command() -> None:
    _, _, table = README.partition("\n## Commands\n")
    listed = re.findall(r"^\| `llava-accel (\w+)`", table.partition("\n## ")[0], re.MULTILINE)
    files = [path for path in (ROOT / "llava_accel").glob("*.py") if not path.stem.startswith("_")]
    verbs = {path.stem for path in files if "\ndef main(" in path.read_text()}
    assert set(listed) == verbs and len(listed) == len(verbs)


@pytest.mark.slow
def test_the_readmes_python_finds_what_it_imports() -> None:
    """In a new process: here `llava_accel.train` may be the module that another test has imported."""
    (line,) = re.findall(r"^from llava_accel import .*$", README, re.MULTILINE)
    code = f"{line}; assert callable(load_recipe) and callable(train)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_readmes_python_does_not_touch_the_quickstarts_run() -> None:
    """A reader has run the quickstart before: a run that is finished is not continued with other settings."""
    (overrides,) = re.findall(r'load_recipe\("recipes/quickstart.toml", (\[.*?\])\)', README)
    quickstart = load_recipe(ROOT / "recipes/quickstart.toml")
    assert (
        load_recipe(ROOT / "recipes/quickstart.toml", json.loads(overrides)).run.output_dir != quickstart.run.output_dir
    )


def test_the_readmes_record_can_be_learned() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    record = parse_record(example.strip().encode(), 0)
    assert len(record.turns) == 2 and record.images == ("a.jpg",)


def test_the_four_files_of_a_step_are_short() -> None:
    _, _, section = README.partition("\n## A step in four files\n")
    files = re.findall(r"^\| \[([\w./]+)\]", section.partition("\n## ")[0], re.MULTILINE)
    assert len(files) == 4
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= 700


def test_the_table_of_recipe_keys_is_current() -> None:
    command = [sys.executable, "-m", "llava_accel.recipe", "--keys"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "recipes/README.md").read_text()
    assert page.endswith(printed.rstrip("\n") + "\n"), "write what the command prints after '## Every key'"


def test_every_recipe_has_its_line() -> None:
    page = (ROOT / "recipes/README.md").read_text()
    assert [path.name for path in ROOT.glob("recipes/*.toml") if f"| [{path.name}]({path.name}) | " not in page] == []
