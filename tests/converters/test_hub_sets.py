"""`prepare hf` says what is wrong in words of its own command line."""

import json
from pathlib import Path

import datasets
import pytest

from llava_accel.converters.hub_sets import hub_parts
from llava_accel.data.row_forms import RowForm
from llava_accel.sources.problems import DataError


@pytest.mark.parametrize(
    ("name", "split", "says"),
    [
        ("nowhere.jsonl", "train", "there is no such file: nowhere.jsonl. Check --set"),
        ("saved", "val", "has no split 'val', but 'train'. Name one with --split train"),
    ],
)
def test_broken_input_of_hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, split: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]})}).save_to_disk(
        "saved"
    )
    with pytest.raises(DataError) as caught:
        list(hub_parts(name, "", [split], RowForm(), tmp_path / "out"))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "What?", "label": "red"}, "Name the columns, --columns question=prompt answer=label, or write"),
        ({"question": "What?", "answer": "red", "image": "gone.png"}, "there is no image 'gone.png' in"),
        ({"question": "What?", "answer": "red", "image": "../a.png"}, "Name it relative to the folder of its file"),
    ],
)
def test_broken_input_of_hf_a_row(tmp_path: Path, row: dict[str, str], says: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (part,) = hub_parts(str(tmp_path / "a.jsonl"), "", ["train"], RowForm(), tmp_path / "out")
    (error,) = part.rows
    assert isinstance(error, DataError) and says in str(error) and "data." not in str(error)
