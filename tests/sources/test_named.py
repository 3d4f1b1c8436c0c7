"""What a recipe may name, and the files that it means."""

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from helpers.samples import encoder, record, write_lines
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.sources.hub import is_name
from llava_accel.sources.named import Named, files_of, held_out_split
from llava_accel.sources.problems import DataError

EVAL = ("validation", "test")


def lines(path: Path, count: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_lines(path, [record("Q", f"{path.stem} {n}", id=str(n)) for n in range(count)])


def saved(folder: Path, splits: tuple[str, ...] = ()) -> Path:
    """A data set as `save_to_disk` of datasets leaves it."""
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    rows = [record("Q", f"A {n}", id=str(n)) for n in range(5)]
    whole = datasets.Dataset.from_list(rows)
    if splits:
        datasets.DatasetDict({name: whole for name in splits}).save_to_disk(str(folder))
    else:
        whole.save_to_disk(str(folder), num_shards=2)
    return folder


def test_a_folder_is_its_data_files_and_a_pattern_those_that_match(tmp_path: Path) -> None:
    first, second = lines(tmp_path / "d" / "a.jsonl"), lines(tmp_path / "d" / "deep" / "b.jsonl")
    (tmp_path / "d" / "notes.txt").write_text("no data")
    (tmp_path / "d" / "._a.jsonl").write_bytes(b"\0\5\x16\7")  # as macOS puts beside each file of an archive
    assert files_of(Named(str(tmp_path / "d"))) == [first]
    assert files_of(Named(str(tmp_path / "**" / "*.jsonl"))) == [first, second]
    with pytest.raises(DataError, match="no file has a name like"):
        files_of(Named(str(tmp_path / "*.parquet")))


def test_a_saved_data_set_is_read_where_it_is(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set")
    data = Corpus(open_sources([Named(str(folder))], tmp_path / "cache"), encoder())
    assert [data.record(n).turns[1].text for n in range(5)] == [f"A {n}" for n in range(5)]
    assert {Path(source.table.path).parent for source in data.sources} == {folder}


def test_of_a_set_with_splits_the_one_that_was_asked_for(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", ("train", "test"))
    assert files_of(Named(str(folder)))[0].parent.name == "train"
    assert files_of(Named(str(folder), splits=EVAL))[0].parent.name == "test"
    assert (held_out_split(str(folder)), held_out_split(str(folder / "train"))) == ("test", "")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        parquet.write_table(
            pa.table({"question": ["Q"]}), tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"
        )
    assert held_out_split(str(tmp_path / "hub")) == "validation"
    with pytest.raises(DataError, match=r"has no split 'dev', but 'train', 'test'.*split = \"train\""):
        files_of(Named(str(folder), splits=("dev",)))


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"_data_files": [1]}', '{"_data_files": 3}', '{"_data_files": []}']
)
def test_what_datasets_did_not_save_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(DataError, match=r"state\.json: .*Save the data set again"):
        files_of(Named(str(tmp_path)))


def test_folders_without_data_are_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        files_of(Named(str(tmp_path / "empty")))
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.jsonl.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"only compressed files: a\.jsonl\.gz\. Unpack"):
        files_of(Named(str(tmp_path / "packed")))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.JPG").write_bytes(b"x")
    with pytest.raises(DataError, match=r"images alone, and no records\. Name the file of the records.*data\.images"):
        files_of(Named(str(tmp_path / "images")))


def test_a_compressed_file_beside_others_of_its_form_is_not_passed_over(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl")
    for name in ("images.tar.gz", "images.zip", "a.jsonl.gz"):  # none of them holds other records
        (tmp_path / name).write_bytes(b"x")
    assert files_of(Named(str(tmp_path))) == [first]
    (tmp_path / "b.jsonl.gz").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"compressed files beside those that are read: b\.jsonl\.gz\. Unpack"
    ) as caught:
        files_of(Named(str(tmp_path)))
    assert files_of(Named(str(caught.value).rpartition("pattern: ")[2])) == [first]
    (tmp_path / "s").mkdir()
    for name in ("0.tar", "1.tgz"):
        (tmp_path / "s" / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"read: 1\.tgz"):
        files_of(Named(str(tmp_path / "s")))


def test_numbers_of_classes_are_read_as_their_names(tmp_path: Path) -> None:
    import datasets

    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_dict({"question": ["Q"] * 3, "answer": [1, 0, -1], "choices": [["a", "b"]] * 3})
    of_animals = whole.remove_columns("choices").cast_column("answer", datasets.ClassLabel(names=["cat", "dog"]))
    of_animals.save_to_disk(str(tmp_path / "saved"))
    of_animals.to_parquet(str(tmp_path / "a.parquet"))
    for name in ("saved", "a.parquet"):
        data = Corpus(open_sources([Named(str(tmp_path / name))], tmp_path / "cache"), encoder())
        assert [data.record(n).turns[1].text for n in range(2)] == ["dog", "cat"]
        with pytest.raises(DataError, match="'answer' is null"):  # -1: without a class
            data.record(2)
    # Names that are numbers themselves are places in the choices.
    whole.cast_column("answer", datasets.ClassLabel(names=["0", "1"])).to_parquet(str(tmp_path / "b.parquet"))
    data = Corpus(open_sources([Named(str(tmp_path / "b.parquet"))], tmp_path / "cache"), encoder())
    assert data.record(0).turns[1].text == "B"


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", '{"info": 3}', '{"info": {"features": {"answer": {"_type": "ClassLabel", "names": 3}}}}', "[" * 99999],
)
def test_metadata_that_datasets_did_not_write_are_passed_over(tmp_path: Path, metadata: str) -> None:
    table = pa.table({"question": ["Q"], "answer": [7]}).replace_schema_metadata({"huggingface": metadata})
    parquet.write_table(table, tmp_path / "a.parquet")
    data = Corpus(open_sources([Named(str(tmp_path / "a.parquet"))], tmp_path / "cache"), encoder())
    assert data.record(0).turns[1].text == "7"


@pytest.mark.parametrize("name", ["org/name", "a/b.c-d_e", "0/1"])
def test_names_of_the_hub_are_known(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "path",
    ["data/train.jsonl", "data/part.arrow", "data/a.CSV", "./x/y", "a/b/c", "name", "/a/b", "a/*", "../b"],
)
def test_paths_are_no_names_of_the_hub(path: str) -> None:
    assert not is_name(path)


def test_a_copy_of_a_data_set_of_the_hub_is_read_by_its_card(tmp_path: Path) -> None:
    lines(tmp_path / "set" / "data" / "one.jsonl")
    lines(tmp_path / "set" / "data" / "two.jsonl", 2)
    card = [{"split": "train", "path": "data/one.jsonl"}, {"split": "test", "path": "data/two.jsonl"}]
    head = json.dumps({"configs": [{"config_name": "default", "data_files": card}]})
    (tmp_path / "set" / "README.md").write_text(f"---\n{head}\n---\n# A set\n")
    for named, count in ((Named(str(tmp_path / "set")), 3), (Named(str(tmp_path / "set"), splits=EVAL), 2)):
        data = Corpus(open_sources([named], tmp_path / "cache"), encoder())
        assert len(data) == count and data.record(0).turns[0].text == "Q"


def test_a_limit_takes_rows_from_everywhere_in_all_files(tmp_path: Path) -> None:
    lines(tmp_path / "d" / "a.jsonl", 60)
    lines(tmp_path / "d" / "b.jsonl", 40)

    def taken(limit: int) -> tuple[list[str], str]:
        data = Corpus(open_sources([Named(str(tmp_path / "d"), limit=limit)], tmp_path / "cache"), encoder())
        return [data.record(n).turns[1].text for n in range(len(data))], data.fingerprint()

    texts, fingerprint = taken(10)
    assert texts == [f"a {n}" for n in range(0, 60, 10)] + [f"b {n}" for n in range(0, 40, 10)]
    assert len(taken(0)[0]) == len(taken(1000)[0]) == 100
    assert len({fingerprint, taken(11)[1], taken(0)[1]}) == 3, "other rows are other data"
    assert taken(1)[0] == ["a 0"]
