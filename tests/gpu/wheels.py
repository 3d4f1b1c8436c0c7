"""Wheels of what a machine with torch lacks to run the figures: a folder to carry to a machine without a network.

    python tests/gpu/wheels.py FOLDER [--has FREEZE.txt] [--most-mib 64]
    bash FOLDER/install.sh                                                      # there

The versions are those of this environment. What torch needs itself is left out, and so is what FREEZE.txt lists, the
output of `pip freeze` there. Wheels are for the Python and the platform of this machine: both must be the same there.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
_TESTS = ("beartype", "pytest")  # that helpers of the tests import
_ITSELF = re.compile(r"torch$|triton|nvidia|cuda")


def names_in(lines: Iterable[str]) -> set[str]:
    """The packages of a requirements file."""
    found = (re.match(r"[A-Za-z0-9][\w.-]*", line.strip()) for line in lines)
    return {canonicalize_name(name[0]) for name in found if name}


def closure(roots: Iterable[str], present: Iterable[str]) -> dict[str, str]:
    """Name and version, in this environment, of packages and all that they need, less what is present with its needs."""
    had = {canonicalize_name(name) for name in present}
    had |= set(_reached(had & {"torch"}, set()))
    return {name: importlib.metadata.version(name) for name in sorted(_reached(roots, had))}


def _reached(roots: Iterable[str], without: set[str]) -> set[str]:
    found, left = set[str](), [canonicalize_name(name) for name in roots]
    while left:
        name = left.pop()
        if name in found or name in without or (_ITSELF.match(name) and name != "torch"):
            continue
        found.add(name)
        needs = map(Requirement, importlib.metadata.requires(name) or [])
        left += [
            canonicalize_name(need.name) for need in needs if not need.marker or need.marker.evaluate({"extra": ""})
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Download them, and write what installs them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--has", type=Path, help="what `pip freeze` says there")
    parser.add_argument("--most-mib", type=int, default=64, help="say so where the folder is larger")
    options = parser.parse_args(arguments)
    project = tomllib.loads(PROJECT.read_text())["project"]
    roots = [name for need in project["dependencies"] if (name := Requirement(need).name) != "torch"]
    present = names_in(options.has.read_text().splitlines()) if options.has else set()
    wanted = [f"{name}=={version}" for name, version in closure([*roots, *_TESTS], present | {"torch"}).items()]
    wanted += project["optional-dependencies"]["kernels"]  # which are of no use here; Triton comes with torch there
    options.folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(options.folder)]
    subprocess.run([*pip, *wanted], check=True)
    lines = ["set -e", 'cd "$(dirname "$0")"', "python -m pip install --no-index --no-deps *.whl"]
    (options.folder / "install.sh").write_text("\n".join(lines) + "\n")
    size = sum(file.stat().st_size for file in options.folder.iterdir()) / 2**20
    too_much = f", more than the {options.most_mib} MiB that can be carried: name with --has what is there"
    print(f"{len(wanted)} wheels, {size:,.0f} MiB{too_much if size > options.most_mib else ''}")


if __name__ == "__main__":
    main()
