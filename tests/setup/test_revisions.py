"""A data set of the hub is named in the recipe of a run with the commit that was read, and read again by it."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from helpers.fake_hub import COMMIT, fake_hub
from helpers.runs import PARITY, recipe, talk
from llava_accel.recipe import dump_recipe
from llava_accel.recipe.inputs import Source
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.revisions import pin_revisions
from llava_accel.sources import hub

NEWER = "f" * 40


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def pinned(name: str, config: str, splits: tuple[str, ...], revision: str) -> str:
        found.append(f"{name} {config} {splits[0]} {revision}")
        return revision or NEWER

    monkeypatch.setattr(hub, "pinned", pinned)
    return found


def test_each_data_set_gets_its_commit_and_files_stay_as_they_are(tmp_path: Path, asked: list[str]) -> None:
    sources = [{"path": "org/name", "split": "dev", "weight": 2.0}, {"path": str(PARITY / "traj_lora.json")}]
    before = recipe(tmp_path, data={"train": sources, "eval": "org/other"})
    data = pin_revisions(before, build_accelerator(before)).data
    assert not isinstance(data.train, str)
    assert [(each.path, each.weight, each.revision) for each in data.train] == [
        ("org/name", 2.0, NEWER),
        (str(PARITY / "traj_lora.json"), 1.0, ""),
    ]
    assert data.eval == (Source(path="org/other", revision=NEWER),)
    assert asked == ["org/name  dev ", "org/other  validation "]
    plain = recipe(tmp_path)
    assert pin_revisions(plain, build_accelerator(plain)) == plain


def test_a_run_that_goes_on_reads_the_commit_that_it_has_begun_with(tmp_path: Path, asked: list[str]) -> None:
    begun = recipe(tmp_path, data={"train": [{"path": "org/name", "revision": COMMIT}]})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(dump_recipe(begun))
    for changes, commit in (({}, COMMIT), ({"resume": "never"}, NEWER)):
        now = recipe(tmp_path, data={"train": "org/name"}, run=changes)
        data = pin_revisions(now, build_accelerator(now)).data
        assert data.train == (Source(path="org/name", revision=commit),)
    (tmp_path / "run" / "recipe.toml").write_text("5")  # damaged
    now = recipe(tmp_path, data={"train": "org/name"})
    assert pin_revisions(now, build_accelerator(now)).data.train == (Source(path="org/name", revision=NEWER),)


_SCRIPT = """
import sys
from llava_accel.sources import hub
from llava_accel.sources.mapped_table import Table
from pathlib import Path
print(hub.pinned("org/name", "", ("train",), ""))
found = hub.files("org/name", "", ("train",), sys.argv[1])
print(sum(len(Table(path, Path(sys.argv[2]))) for path in found))
"""


@pytest.mark.slow
def test_a_data_set_is_read_from_the_hub_and_offline_from_what_was_downloaded(tmp_path: Path) -> None:
    rows = [talk(n, "Which?", "red") | {"image": {"bytes": b"\x89PNG\r\n\x1a\n", "path": "a.png"}} for n in range(7)]
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), buffer)
    files = {"README.md": b"---\nlicense: mit\n---\n", "data/train-00000-of-00001.parquet": buffer.getvalue()}

    def run(revision: str, **environment: str) -> subprocess.CompletedProcess[str]:
        places = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", _SCRIPT, revision, str(tmp_path / "cache")]
        settings = os.environ | places | environment
        return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120)

    with fake_hub(files) as address:
        online = run(COMMIT, HF_ENDPOINT=address)
    assert online.stdout.split() == [COMMIT, "7"], online.stderr
    assert run(COMMIT, HF_HUB_OFFLINE="1").stdout.split() == [COMMIT, "7"]
    assert f"has commit {COMMIT}, and not {NEWER}" in run(NEWER, HF_HUB_OFFLINE="1").stderr
