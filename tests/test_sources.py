"""A run gives the same numbers whatever form its data have: as files, in Parquet, in Arrow, in JSON, in a shard."""

import base64
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from torch import Tensor

from helpers.runs import PARITY, metrics, recipe, talk, trained, without_times
from llava_accel.train import train

IMAGES = PARITY / "images"
RECORDS: list[dict[str, Any]] = [
    talk(n, f"Which colour has number {n}?", answer, f"t{n // 3}.png")
    for n, answer in enumerate(
        ["red", "blue", "a green circle", "red", "two squares", "nothing", "blue", "red", "left"]
    )
]


def content(row: Mapping[str, Any]) -> bytes:
    return (IMAGES / row["image"][0]).read_bytes()


def _files(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(RECORDS))
    return folder / "a.json"


def _in_text(folder: Path) -> Path:
    rows = [row | {"image": base64.b64encode(content(row)).decode()} for row in RECORDS]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "a.jsonl"


def _table() -> pa.Table:
    rows = [row | {"image": {"bytes": content(row), "path": row["image"][0]}} for row in RECORDS]
    return pa.Table.from_pylist(rows)


def _parquet(folder: Path) -> Path:
    parquet.write_table(_table(), folder / "a.parquet")
    return folder / "a.parquet"


def _saved(folder: Path) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(_table()).save_to_disk(str(folder / "set"))
    return folder / "set"


def _shard(folder: Path) -> Path:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for row in RECORDS:
            for suffix, part in (("png", content(row)), ("json", json.dumps(row).encode())):
                info = tarfile.TarInfo(f"{row['id']}.{suffix}")
                info.size = len(part)
                archive.addfile(info, io.BytesIO(part))
    return folder / "a.tar"


FORMS: dict[str, Callable[[Path], Path]] = {
    "base64": _in_text, "parquet": _parquet, "save_to_disk": _saved, "shard": _shard
}  # fmt: skip


def numbers(folder: Path, path: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    keys = {"share_prefix": True, "eval": [{"path": str(path), "limit": 5}]}
    images = {} if path.suffix == ".json" else {"images": ""}
    train(
        recipe(
            folder, path, data=keys | images, train={"per_device_batch_size": 3, "epochs": 2},
            eval={"at_start": True, "train_limit": 2, "max_new_tokens": 4},
        )
    )  # fmt: skip
    return without_times(metrics(folder / "run")), trained(folder / "run" / "export")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Of the data as files."""
    folder = tmp_path_factory.mktemp("plain")
    return numbers(folder, _files(folder))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_has_the_numbers_of_the_same_data_as_files(
    tmp_path: Path, expected: tuple[list[dict[str, Any]], dict[str, Tensor]], form: str
) -> None:
    given = numbers(tmp_path, FORMS[form](tmp_path))
    assert given[0] == expected[0]
    assert all(torch.equal(given[1][name], weight) for name, weight in expected[1].items())
