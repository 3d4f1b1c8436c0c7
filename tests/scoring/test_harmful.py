"""The records that a run shows to be worth a look: in its folder, on its page, and as lines that one can mend."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import llava_accel.train as verb
from helpers.report_run import HOSTILE, write_run
from helpers.runs import recipe, tables, talk
from helpers.verbs import assert_refused, start
from llava_accel.pages.write import write_report
from llava_accel.recipe.toml import to_toml
from llava_accel.scoring.harmful import CONTRADICTED, HARD, HARMFUL, WRONG

COLORS = ("red", "green", "blue", "white")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures of one colour each, two of which are labelled twice, and its recipe."""
    folder = tmp_path_factory.mktemp("harmful")
    for number in range(12):
        color = tuple(value // (1 + number // 4 % 3) for value in {
            "red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250), "white": (250, 250, 250)
        }[COLORS[number % 4]])  # fmt: skip
        Image.new("RGB", (60, 60), color).save(folder / f"{number}.png")
    training = [talk(number, "What is it?", COLORS[number % 4], f"{number}.png") for number in range(8)]
    training += [talk("twice", "What is it?", "nothing", "0.png"), talk("other", "And what else?", "nothing", "0.png")]
    held_out = [talk(number, "What is it?", "a small circle", f"{number}.png") for number in range(8, 12)]
    changes: dict[str, Any] = {
        "data": {
            "train": str(write(folder / "train.jsonl", training)),
            "eval": str(write(folder / "eval.jsonl", held_out)),
            "images": str(folder),
            "cache_features": True,
        },
        "train": {"max_steps": 2},
        "eval": {"train_limit": 16, "every": 2},
    }
    verb.train(recipe(folder, **changes))
    (folder / "recipe.toml").write_text(to_toml(tables(folder, **changes)))
    return folder


@pytest.mark.slow
def test_wrong_answers_are_named_with_the_nearest_pictures_of_the_training_data(folder: Path) -> None:
    wrong = [line for line in lines(folder / "run" / "predictions" / HARMFUL) if line["why"] == WRONG]
    assert [line["loss"] for line in wrong] == sorted((line["loss"] for line in wrong), reverse=True) and len(
        wrong
    ) == 4
    for line in wrong:
        number = int(line["image"].removesuffix(".png"))
        assert (line["file"], line["row"], line["id"]) == (str(folder / "eval.jsonl"), number - 7, f"r{number}")
        assert line["question"] == "What is it?" and line["answer"] == "a small circle" != line["prediction"]
        similarities = [near["similarity"] for near in line["nearest"]]
        assert (
            len(similarities) == 3 and similarities == sorted(similarities, reverse=True) and similarities[0] <= 1.0001
        )
        assert {near["file"] for near in line["nearest"]} == {str(folder / "train.jsonl")}
        assert all(near["question"] == "What is it?" for near in line["nearest"])


@pytest.mark.slow
def test_the_hardest_and_the_contradicting_records_are_named(folder: Path) -> None:
    found = lines(folder / "run" / "predictions" / HARMFUL)
    contradicted = {
        line["id"]: (line["other"]["id"], line["other"]["row"]) for line in found if line["why"] == CONTRADICTED
    }
    assert contradicted == {"r0": ("rtwice", 9), "rtwice": ("r0", 1)}
    hard = [line["loss"] for line in found if line["why"] == HARD]
    assert len(hard) == 10 and hard == sorted(hard, reverse=True)


@pytest.mark.slow
def test_the_report_shows_them_beside_their_nearest_pictures(folder: Path) -> None:
    page = (folder / "run" / "report.html").read_text()
    section = page.partition('<section id="doubts">')[2].partition("</section>")[0]
    assert section.count("<article>") == 1 + 4 and section.count('class="images near"') == 12
    assert section.count('label">expected</span>') == 4, "of each question that was answered wrong"
    assert section.count('label">answer</span>') == 2 + 12, "of two that contradict each other, and of the nearest"
    assert "train.jsonl, row 9" in section and "eval.jsonl, row 4" in section and "--against" in section


@pytest.mark.slow
def test_check_lists_what_is_left_to_mend_and_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    run, out = folder / "run", tmp_path / "mend.jsonl"
    words = [str(folder / "recipe.toml"), "--against", str(run)]
    ended = start("check", *words, "--mend", str(out))
    assert ended.code == 0 and lines(out) == lines(run / "predictions" / HARMFUL)
    assert "correct it in that file and row" in " ".join(ended.out.split())
    printed = [json.loads(line) for line in start("check", *words).out.splitlines() if line.startswith('{"why"')]
    assert printed == lines(out)

    training = lines(folder / "train.jsonl")
    mended = [training[8] | {"conversations": training[0]["conversations"]}, *training[:8], training[9]]
    copy = write(tmp_path / "train.jsonl", mended)
    ended = start("check", *words, f"data.train={copy}", "run.resume=never", "--mend", str(out))
    assert ended.code == 0 and "or with another answer now: 1 more" in " ".join(ended.out.split())
    found = lines(out)
    assert not [line for line in found if line["why"] == CONTRADICTED or line["id"] == "rtwice"]
    assert {(line["id"], line["row"]) for line in found if line["why"] == HARD} >= {
        ("r0", 2),
        ("r7", 9),
        ("rother", 10),
    }


@pytest.mark.slow
def test_a_run_without_features_says_so_and_names_the_wrong_answers_nevertheless(folder: Path, tmp_path: Path) -> None:
    (folder / "run" / "predictions" / HARMFUL).rename(tmp_path / "kept")
    ended = start(
        "check", str(folder / "recipe.toml"), "--against", str(folder / "run"), "--mend", str(tmp_path / "out")
    )
    (tmp_path / "kept").rename(folder / "run" / "predictions" / HARMFUL)
    assert ended.code == 0 and "kept no features" in ended.out
    assert [line["why"] for line in lines(tmp_path / "out")].count(WRONG) == 4
    assert not any("nearest" in line for line in lines(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "says"), [("[1]\n", "is damaged"), ('{"id": 1, "image": 2, "question": 3, "loss": "x"}\n', "not written by"),
                      ("{", "is damaged")]
)  # fmt: skip
def test_a_run_that_was_edited_is_refused(folder: Path, row: str, says: str) -> None:
    file = folder / "run" / "predictions" / "training.jsonl"
    before = file.read_text()
    file.write_text(row)
    ended = start("check", str(folder / "recipe.toml"), "--against", str(folder / "run"))
    file.write_text(before)
    assert_refused(ended, [says])
    assert_refused(start("check", str(folder / "recipe.toml"), "--against", str(folder / "cache")), ["is not a run"])


def test_texts_of_the_records_are_never_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=50, num_questions=12)
    one = {
        "file": f"{HOSTILE}.jsonl",
        "row": 1,
        "id": HOSTILE,
        "image": HOSTILE,
        "question": HOSTILE,
        "answer": HOSTILE,
    }
    near = one | {"similarity": 0.5, "image": [HOSTILE, "../../etc/passwd", "0.png"]}
    rows = [one | {"why": WRONG, "prediction": HOSTILE, "loss": 2.0, "nearest": [near]}]
    rows += [
        one | {"why": CONTRADICTED, "other": one | {"row": 2}},
        one | {"why": CONTRADICTED, "other": one | {"row": 0}},
    ]
    write(run / "predictions" / HARMFUL, rows)
    html = write_report(run).read_text()
    section = html.partition('<section id="doubts">')[2].partition("</section>")[0]
    assert html.count("<script") == 1 and "<img src=x" not in html and "\x1b" not in html
    assert section.count("&lt;script&gt;") >= 8 and section.count("<article>") == 2
