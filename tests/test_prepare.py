"""`prepare`: every example of its help runs, and what it writes is what training reads."""

import csv
import json
import shlex
from pathlib import Path

import pytest

from llava_accel.converters import formats as converters
from llava_accel.data.records import Record, parse_record
from llava_accel.prepare import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_pair(folder: Path, subtype: str, prefix: str = "") -> list[str]:
    """Three questions on two images in `folder`/coco, in the official form; returns both files."""
    (folder / "coco" / subtype).mkdir(parents=True, exist_ok=True)
    for image_id in (9, 25):
        (folder / "coco" / subtype / f"COCO_{subtype}_{image_id:012d}.jpg").touch()
    questions = folder / f"{prefix}OpenEnded_mscoco_{subtype}_questions.json"
    annotations = folder / f"{prefix}mscoco_{subtype}_annotations.json"
    images = {90: 9, 91: 9, 92: 25}
    asked = [
        {"question_id": key, "image_id": image_id, "question": "What, exactly?"} for key, image_id in images.items()
    ]
    answers = [{"answer": text, "answer_id": place} for place, text in enumerate(["red"] * 7 + ["pink"] * 3)]
    noted = [
        {
            "question_id": key,
            "image_id": image_id,
            "question_type": "what",
            "answer_type": "other",
            "answers": answers,
        }
        for key, image_id in images.items()
    ]
    questions.write_text(json.dumps({"data_subtype": subtype, "questions": asked}))
    annotations.write_text(json.dumps({"data_subtype": subtype, "annotations": noted}))
    return [str(questions), str(annotations)]


def _example(source: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The arguments of the command that the help shows."""
    with pytest.raises(SystemExit) as stopped:
        main([source, "--help"])
    assert stopped.value.code == 0
    _, _, example = capsys.readouterr().out.partition("\nexample")
    command = example[example.index("llava-accel prepare") :].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[:3] == ["llava-accel", "prepare", source]
    return words[2:]


def _records(path: Path) -> list[Record]:
    return [parse_record(line, row) for row, line in enumerate(path.read_bytes().splitlines(), start=1)]


@pytest.mark.parametrize(("source", "prefix"), [("okvqa", ""), ("vqa", "v2_")])
def test_the_example_of_the_official_files_runs_and_gives_train_and_val(
    source: str, prefix: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for subtype in ("train2014", "val2014"):
        write_pair(folder, subtype, prefix=prefix)
    main(_example(source, capsys))
    out = capsys.readouterr().out
    for split, count in (("train", "3 questions on 2 images"), ("val", "3 questions on 2 images")):
        path = Path("data") / source / f"{split}.jsonl"
        assert f"{path}: {count}" in out
        records = _records(path)
        assert [record.id for record in records] == ["90", "91", "92"]
        assert records[0].images == (f"{split}2014/COCO_{split}2014_000000000009.jpg",)
        assert sum(count for _, count in records[0].answers) == 10
        short = "Answer the question using a single word or phrase."
        assert [turn.text for turn in records[0].turns] == [f"<image>\nWhat, exactly?\n{short}", "red"]
    assert shlex.split(out.splitlines()[-1]) == [
        *["next:", "python", "-m", "llava_accel.check", "recipes/okvqa_qlora.toml"],
        *[f"data.train=data/{source}/train.jsonl", f"data.eval=data/{source}/val.jsonl", "data.images=coco"],
    ]


def test_the_example_of_a_table_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos").mkdir()
    (folder / "photos" / "a.jpg").touch()
    with Path("labels.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["photo", "question", "label"], ["a.jpg", "Which, if any?", "Äpfel"]])
    main(_example("csv", capsys))
    (record,) = _records(Path("data/labels.jsonl"))
    assert (record.id, record.images, record.question) == ("labels-1", ("a.jpg",), "Which, if any?")
    assert record.answers == (("Äpfel", 1.0),)
    assert capsys.readouterr().out.splitlines()[-1].endswith("data.train=data/labels.jsonl data.images=photos")


def test_the_example_of_easy_vqa_runs_and_its_folder_stands_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder / "package"
    for split, answers in (("train", ["blue", "no", "circle", "yes"]), ("test", ["gray"])):
        (source / split / "images").mkdir(parents=True)
        (source / split / "images" / "0.png").touch()
        rows = [["what, exactly?", answer, 0] for answer in answers]
        (source / split / "questions.json").write_text(json.dumps(rows))
    monkeypatch.setattr(converters, "easy_vqa_folder", lambda: source)
    main(_example("easy-vqa", capsys))
    for split, types in (("train", ["color", "yes-no", "shape", "yes-no"]), ("test", ["color"])):
        records = _records(Path("data/easy-vqa") / f"{split}.jsonl")
        assert [record.question_type for record in records] == types
        assert all((Path("data/easy-vqa/images") / record.images[0]).is_file() for record in records)
    assert "data.images=data/easy-vqa/images" in capsys.readouterr().out


def test_an_order_of_files_other_than_train_val_still_trains_on_train(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [write_pair(folder, subtype) for subtype in ("val2014", "train2014")]
    files = [part for pair in pairs for part in ("--questions", pair[0], "--annotations", pair[1])]
    main(["vqa", *files, "--images", "coco", "--out", "o"])
    assert "data.train=o/train.jsonl data.eval=o/val.jsonl" in capsys.readouterr().out


def test_split_names_and_suffix_are_the_users_to_choose(folder: Path) -> None:
    questions, annotations = write_pair(folder, "train2014")
    files = ["--questions", questions, "--annotations", annotations, "--images", "coco"]
    main(["okvqa", *files, "--out", "o", "--split-name", "mine", "--suffix", ""])
    first = json.loads(Path("o/mine.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["conversations"][0]["value"] == "<image>\nWhat, exactly?"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--questions", "{q}"], "Give one annotations file for each"),
        (["--split-name", "a", "b"], "Give one a pair"),
        (["--questions", "{q}", "--annotations", "{a}"], "a second split 'train'"),
        (["--images", "nowhere"], "Check --images"),
    ],
)
def test_a_wrong_command_ends_with_one_line_that_tells_the_remedy(more: list[str], told: str, folder: Path) -> None:
    questions, annotations = write_pair(folder, "train2014")
    command = ["okvqa", "--questions", "{q}", "--annotations", "{a}", "--images", "coco", "--out", "o", *more]
    with pytest.raises(SystemExit) as stopped:
        main([word.format(q=questions, a=annotations) for word in command])
    message = str(stopped.value)
    assert message.startswith("error: ") and told in message and "\n" not in message


def test_a_table_goes_to_a_file_that_training_knows(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"ends in \.jsonl"):
        main(["csv", "--file", "t.csv", "--images", ".", "--out", "t.json"])


@pytest.mark.parametrize(("written", "character"), [("tab", "\t"), ("\\t", "\t"), (";", ";")])
def test_the_delimiter_may_be_written_as_shells_allow(written: str, character: str, folder: Path) -> None:
    (folder / "a.jpg").touch()
    Path("t.csv").write_text(f"image{character}question{character}answer\na.jpg{character}q{character}a\n")
    main(["csv", "--file", "t.csv", "--images", ".", "--out", "t.jsonl", "--delimiter", written])
    assert _records(Path("t.jsonl"))[0].question == "q"


def test_a_delimiter_of_two_characters_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["csv", "--file", "t.csv", "--images", ".", "--out", "t.jsonl", "--delimiter", ";;"])
    assert "is not one character" in capsys.readouterr().err
