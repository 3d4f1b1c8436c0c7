"""`prepare`: every example of its help runs, and what it writes is what training reads."""

import csv
import json
import shlex
from pathlib import Path

import pytest

from llava_accel.converters import easy_vqa
from llava_accel.converters.sources import SOURCES
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


def _next(out: str) -> list[str]:
    """The words of the command that is printed last."""
    first, *words = shlex.split(out.splitlines()[-1])
    assert first == "next:"
    return words


@pytest.mark.parametrize(("source", "prefix"), [("okvqa", ""), ("vqav2", "v2_")])
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
    assert _next(out) == [
        *["llava-accel", "init", "my.toml", "--data", f"data/{source}/train.jsonl"],
        *["--eval", f"data/{source}/val.jsonl", "--images", "coco"],
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
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "labels.csv: encoding utf-8, delimiter ','"
    assert _next(said) == ["llava-accel", "init", "my.toml", "--data", "data/labels.jsonl", "--images", "photos"]


def test_the_example_of_easy_vqa_runs_and_its_folder_stands_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder / "package"
    for split, answers in (("train", ["blue", "no", "circle", "yes"]), ("test", ["gray"])):
        (source / split / "images").mkdir(parents=True)
        (source / split / "images" / "0.png").touch()
        rows = [["what, exactly?", answer, 0] for answer in answers]
        (source / split / "questions.json").write_text(json.dumps(rows))
    monkeypatch.setattr(easy_vqa, "easy_vqa_folder", lambda: source)
    main(_example("easy-vqa", capsys))
    for split, types in (("train", ["color", "yes-no", "shape", "yes-no"]), ("test", ["color"])):
        records = _records(Path("data/easy-vqa") / f"{split}.jsonl")
        assert [record.question_type for record in records] == types
        assert all((Path("data/easy-vqa/images") / record.images[0]).is_file() for record in records)
    words = ["--eval", "data/easy-vqa/test.jsonl", "--images", "data/easy-vqa/images"]
    assert _next(capsys.readouterr().out)[-4:] == words


def test_an_order_of_files_other_than_train_val_still_trains_on_train(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [write_pair(folder, subtype) for subtype in ("val2014", "train2014")]
    files = [part for pair in pairs for part in ("--questions", pair[0], "--annotations", pair[1])]
    main(["vqa", *files, "--images", "coco", "--out", "o"])
    assert _next(capsys.readouterr().out)[3:7] == ["--data", "o/train.jsonl", "--eval", "o/val.jsonl"]


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
        (["--split-name", "a", "b"], "Give one per file or pair"),
        (["--questions", "{q}", "--annotations", "{a}"], "a second split 'train'"),
        (["--images", "nowhere"], "Check --images"),
    ],
)
def test_a_wrong_command_ends_with_one_line_that_tells_the_remedy(
    more: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, annotations = write_pair(folder, "train2014")
    command = ["okvqa", "--questions", "{q}", "--annotations", "{a}", "--images", "coco", "--out", "o", *more]
    with pytest.raises(SystemExit, match="2"):
        main([word.format(q=questions, a=annotations) for word in command])
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: ") and told in message


def test_a_table_goes_to_a_file_that_training_knows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["csv", "--file", "t.csv", "--images", ".", "--out", "t.json"])
    assert "ends in .jsonl" in capsys.readouterr().err


PUBLISHED: dict[str, dict[str, object]] = {
    "aokvqa": {
        name: [{"question_id": "a", "image_id": 9, "question": "q?", "choices": ["x", "y"], "correct_choice_idx": 1,
                "direct_answers": ["red"] * 10, "difficult_direct_answer": False}]
        for name in ("aokvqa_v1p0_train.json", "aokvqa_v1p0_val.json")
    },
    "gqa": {
        name: {"7": {"question": "q?", "imageId": "9", "answer": "red", "types": {"structural": "query"}}}
        for name in ("train_balanced_questions.json", "testdev_balanced_questions.json")
    },
    "vizwiz": {
        f"vizwiz/{split}.json": [{"image": f"VizWiz_{split}_00000000.jpg", "question": "q?", "answerable": 1,
                                  "answers": [{"answer": "red", "answer_confidence": "yes"}], "answer_type": "other"}]
        for split in ("train", "val")
    },
    "textvqa": {
        f"TextVQA_0.5.1_{split}.json": {"data": [{"question_id": 1, "image_id": "9a", "question": "q?",
                                                  "answers": ["red"] * 10}]}
        for split in ("train", "val")
    },
    "docvqa": {
        f"{split}_v1.0_withQT.json": {"data": [{"questionId": 1, "image": "documents/9a_1.png", "question": "q?",
                                                "answers": ["red"]}]}
        for split in ("train", "val")
    },
    "chartqa": {
        f"ChartQA Dataset/{split}/{split}_{kind}.json": [{"imgname": "9.png", "query": "q?", "label": "red"}]
        for split in ("train", "val") for kind in ("human", "augmented")
    },
    "scienceqa": {
        "scienceqa/problems.json": {
            number: {"question": "q?", "choices": ["x", "y"], "answer": 1, "hint": "", "lecture": "", "solution": "",
                     "image": image, "split": "train"}
            for number, image in (("1", "image.png"), ("2", None), ("3", None))
        },
        "scienceqa/pid_splits.json": {"train": ["1"], "test": ["2"], "val": ["3"]},
    },
    "coco-captions": {
        f"captions_{split}2017.json": {"images": [{"id": 9, "file_name": f"{9:012d}.jpg"}],
                                       "annotations": [{"id": 3, "image_id": 9, "caption": "red"}]}
        for split in ("train", "val")
    },
}  # fmt: skip
"""Files of one question as the data sets publish them; their forms in full are in converters/."""
SHOWN = (
    "coco/train2017/000000000009.jpg", "images/9.jpg", "vizwiz/train/VizWiz_train_00000000.jpg",
    "vizwiz/val/VizWiz_val_00000000.jpg", "textvqa/train_images/9a.jpg", "docvqa/documents/9a_1.png",
    "ChartQA Dataset/train/png/9.png", "ChartQA Dataset/val/png/9.png", "scienceqa/images/train/1/image.png",
)  # fmt: skip
"""The images of all of these."""


def publish(source: str) -> None:
    """Write the data set's files and the images to where its example has them."""
    for name in SHOWN:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    for name, content in PUBLISHED[source].items():
        Path(name).write_text(json.dumps(content))


@pytest.mark.parametrize("source", PUBLISHED)
def test_the_example_of_every_data_set_runs_and_ends_in_the_command_for_a_recipe(
    source: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(source)
    command = _example(source, capsys)
    main(command)
    said = capsys.readouterr().out
    held_out = "testdev" if source == "gqa" else "val"
    for split in ("train", held_out):
        records = _records(Path("data") / source / f"{split}.jsonl")
        assert len(records) == (2 if source == "chartqa" else 1)
        assert records[0].turns[-1].text == ("B" if source == "scienceqa" else "red")
        assert f"data/{source}/{split}.jsonl: {len(records)} questions on {len(records[0].images)} images" in said
    images = command[command.index("--images") + 1]
    data = ["--data", f"data/{source}/train.jsonl", "--eval", f"data/{source}/{held_out}.jsonl"]
    assert _next(said) == ["llava-accel", "init", "my.toml", *data, "--images", images]


def test_every_source_is_tested_with_the_example_of_its_help() -> None:
    assert {*PUBLISHED, "okvqa", "vqav2", "easy-vqa", "csv"} == SOURCES.keys() - {"vqa", "hf"}
    assert SOURCES["vqa"].example == SOURCES["vqav2"].example


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("vizwiz", "When the provided information is insufficient, respond with 'Unanswerable'.\n"),
        ("textvqa", "q?\n"),
        ("chartqa", "q?\n"),
    ],
)
def test_short_answers_are_asked_for_as_llava_1_5_does(
    source: str, line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(source)
    main(_example(source, capsys))
    prompt = _records(Path("data") / source / "train.jsonl")[0].turns[0].text
    assert prompt.endswith(f"{line}Answer the question using a single word or phrase.")


def test_options_are_asked_for_by_letter_and_scored_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish("aokvqa")
    main([*_example("aokvqa", capsys), "--multiple-choice"])
    (record,) = _records(Path("data/aokvqa/train.jsonl"))
    letter = "Answer with the option's letter from the given choices directly."
    assert [turn.text for turn in record.turns] == [f"<image>\nq?\nA. x\nB. y\n{letter}", "B"]
    assert record.choices == ("x", "y") and 'eval.metric = "multiple_choice"' in capsys.readouterr().out


def test_bad_records_end_it_or_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish("vizwiz")
    command = _example("vizwiz", capsys)
    rows = json.loads(Path("vizwiz/train.json").read_text())
    bad = [rows[0] | {"image": f"absent{number}.jpg"} for number in range(2)] + [rows[0] | {"question": " "}]
    Path("vizwiz/train.json").write_text(json.dumps([*bad, *rows]))
    with pytest.raises(SystemExit, match="2"):
        main(command)
    message = capsys.readouterr().err
    assert message.startswith("error: vizwiz/train.json: 3 of 4 records cannot be used:\n  2 of 3 images are not in")
    assert (
        "absent0.jpg, absent1.jpg" in message and "vizwiz.cs.colorado.edu" in message and "question is blank" in message
    )
    assert not Path("data").exists() or list(Path("data").rglob("*")) == [Path("data/vizwiz")]
    main([*command, "--on-bad-record", "skip"])
    said = capsys.readouterr().out
    assert "data/vizwiz/train.jsonl: 1 questions on 1 images\nleft out 3 of 4 records of vizwiz/train.json:" in said


def test_names_with_spaces_are_quoted_in_the_next_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my images").mkdir()
    (folder / "my images" / "a.jpg").touch()
    Path("t.csv").write_text("image;frage;a1;a2;a3\na.jpg;q;x;y;y\n")
    columns = ["--question-column", "frage", "--answer-column", "a1", "a2", "a3"]
    main(["csv", "--file", "t.csv", "--images", "my images", "--out", "o p/t.jsonl", *columns])
    assert capsys.readouterr().out.endswith("--data 'o p/t.jsonl' --images 'my images'\n")
    assert _records(Path("o p/t.jsonl"))[0].answers == (("x", 1.0), ("y", 2.0))


def test_a_question_for_all_rows_takes_no_column(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.jpg").touch()
    Path("t.csv").write_text("image,answer\na.jpg,cat\n")
    command = ["csv", "--file", "t.csv", "--images", ".", "--out", "t.jsonl", "--question", "What is this?"]
    main(command)
    assert _records(Path("t.jsonl"))[0].turns[0].text == "<image>\nWhat is this?"
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--question-column", "q"])
    assert "--question and --question-column" in capsys.readouterr().err


@pytest.mark.parametrize(("written", "character"), [("tab", "\t"), ("\\t", "\t"), (";", ";")])
def test_the_delimiter_may_be_written_as_shells_allow(written: str, character: str, folder: Path) -> None:
    (folder / "a.jpg").touch()
    Path("t.csv").write_text(f"image{character}question{character}answer\na.jpg{character}q{character}a\n")
    main(["csv", "--file", "t.csv", "--images", ".", "--out", "t.jsonl", "--delimiter", written])
    assert _records(Path("t.jsonl"))[0].question == "q"


@pytest.mark.parametrize("written", [";;", "", '"', "\n"])
def test_what_cannot_stand_between_cells_is_refused(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["csv", "--file", "t.csv", "--images", ".", "--out", "t.jsonl", "--delimiter", written])
    assert "is not one character between cells" in capsys.readouterr().err
