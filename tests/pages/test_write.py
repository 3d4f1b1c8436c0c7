"""The report as a file: what it says of a run, when it is written, and that nothing keeps a run from going on."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import llava_accel.train as verb
from helpers.report_run import HOSTILE, write_run
from helpers.runs import PARITY, recipe
from llava_accel.console import command_line
from llava_accel.loop import validation
from llava_accel.pages import write as live
from llava_accel.pages.gallery import MOST_CARDS, choose, hardest, image_roots, show, verdict
from llava_accel.pages.history import read_run
from llava_accel.pages.html import visible
from llava_accel.pages.outcome import notes
from llava_accel.pages.write import write_comparison, write_report
from llava_accel.recipe import DataTable
from llava_accel.runtime.engines import build_accelerator
from llava_accel.scoring.held_out import Evaluation
from llava_accel.setup.run_folder import write_run_files


def run_verb(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    command_line.start("report")


def words(page: Path) -> str:
    """The text of a page without its markup, each run of white space one space."""
    body = page.read_text(encoding="utf-8").split("<body>")[1].split("<script>")[0]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


@pytest.mark.usefixtures("plots")
def test_the_verb_writes_the_page_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, num_steps=100, num_questions=20)
    run_verb(monkeypatch, run)
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("plots")
def test_the_page_says_what_came_of_the_run_and_how_to_repeat_it(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=100, overfits=True, optim={"learning_rate": 1e-4})
    text = words(write_report(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [line["eval"] for line in lines if "eval" in line]
    start, end, blind = (f"{100 * value:.1f} %" for value in (
        before["vqa_accuracy"], after["vqa_accuracy"], after["blind_vqa_accuracy"]
    ))  # fmt: skip
    assert f"VQA accuracy rose from {start} to {end} on 160 held-out questions" in text
    assert f"Without seeing the images the same model reaches {blind}" in text
    assert "optim.learning_rate 0.0001 0.0002" in text and "NVIDIA RTX 4090" in text and "transformers 5.23.0" in text
    assert f"llava-accel train {run}/recipe.toml run.output_dir={run}-again" in text
    assert "llava-accel train recipes/okvqa_qlora.toml optim.learning_rate=1e-4" in text


@pytest.mark.usefixtures("plots")
def test_the_page_loads_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=50, num_questions=30)
    other = write_run(tmp_path, num_steps=50, num_questions=30, name="other", seed=9, skill=0.1)
    for page in (write_report(run), write_comparison([run, other], tmp_path / "both.html")):
        html = page.read_text()
        assert not re.search(r"""<[^>]*\b(src|href|action)\s*=\s*["']?(?!data:|#)[^"'\s>]""", html)
        assert "@import" not in html and "url(http" not in html and "default-src 'none'" in html
        assert html.count("data:image/jpeg;base64,") == html.count("<img") > 10


@pytest.mark.usefixtures("plots")
def test_text_of_the_data_is_never_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path, num_steps=50, num_questions=20, hostile=True)
    html = write_report(run).read_text(encoding="utf-8")
    assert html.count("<script") == 1 and "<img src=x" not in html
    assert "&lt;script&gt;document.title" in html
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)


@pytest.mark.parametrize("text", ["naïve\tréponse\n", "नमस्ते क्‍ष", "می‌خواهم", "👩‍👧 ok", "a\u00a0b"])
def test_text_of_every_language_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible(HOSTILE).endswith(r"\x00\x07\x1b[31m\u202egnp.exe\ud800")  # pyright: ignore
    assert visible("a\rb\u2066c\ufeff") == r"a\rb\u2066c\ufeff"
    assert visible("\u200e\u200f\u061c\u200b\u2060") == r"\u200e\u200f\u061c\u200b\u2060"


def test_right_and_wrong_answers_are_mixed_and_stay_the_same_between_evaluations(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, num_questions=600, num_steps=100, skill=0.9))
    late = run.predictions(100)
    shown, hard = choose(late, "vqa_accuracy"), {*hardest(late)}
    verdicts = [verdict(late[number]["vqa_accuracy"]) for number in shown]
    assert len(shown | hard) <= MOST_CARDS and verdicts.count("right") == len(verdicts) // 2
    assert len(hard) == 12
    lowest = min(late[number]["loss"] for number in hard)
    assert all(row["loss"] <= lowest for number, row in enumerate(late) if number not in hard)
    kept = shown & choose(run.predictions(50), "vqa_accuracy")
    assert len(kept) > len(shown) // 3


def test_a_pair_is_hard_by_its_margin_and_not_by_the_loss_of_one_of_its_answers() -> None:
    margins = (2.0, -3.0, 0.5)
    pairs = [{"loss": float(number), "reward_margin": margin} for number, margin in enumerate(margins)]
    assert hardest([*pairs, {}]) == [1, 2, 0] and hardest([{"loss": row["loss"]} for row in pairs]) == [2, 1, 0]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_where_all_are_right_or_all_wrong_the_gallery_is_full(tmp_path: Path, share: float) -> None:
    rows = read_run(write_run(tmp_path, num_questions=200, num_steps=50)).predictions(50)
    rows = [{**row, "vqa_accuracy": share, "loss": None} for row in rows]
    assert len(choose(rows, "vqa_accuracy")) == MOST_CARDS


def test_a_image_is_found_where_the_recipe_says_and_nowhere_else(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, num_steps=50))
    (tmp_path / "broken.png").write_text("no image")
    root, downloads = image_roots(run.recipe.data)
    assert downloads.name == "downloads"
    assert show("0.png", [root]).uri.startswith("data:image/jpeg;base64,")
    for name in ("../broken.png", "none.png", "/etc/passwd"):
        assert not show(name, [root]).uri and show(name, [root]).problem
    assert "not a readable image" in show("broken.png", [tmp_path]).problem
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "0.png").write_bytes((root / "0.png").read_bytes())
    assert "2 folders" in show("0.png", [root, tmp_path / "more"]).problem


def test_trackers_get_images_of_every_source(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, num_steps=50, num_questions=20))
    (tmp_path / "empty").mkdir()
    sources = [{"path": "a.jsonl", "images": str(tmp_path / name)} for name in ("empty", "images")]
    data = DataTable.model_validate({"train": "a.jsonl", "eval": sources})
    assert len(live.tracker_images(run.predictions(50), data, "vqa_accuracy")) == 12


def test_what_stands_beside_the_numbers_is_counted_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path, num_steps=50, num_questions=20)
    (folder / "skipped.txt").write_text(
        "a.json, row 1: it has no image. Add it\na.json, row 9: it is empty. Remove it\n"
    )
    (folder / "nonfinite.jsonl").write_text('{"step": 3}\n')
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    waited = [line | ({"data_wait_s": 0.6} if "loss" in line else {}) for line in lines]
    assert notes(read_run(folder)) == [
        "1 step made no update: a loss or gradient was not finite. nonfinite.jsonl names the records.",
        "2 records were left out; skipped.txt says which and why.",
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in waited))
    assert notes(read_run(folder))[0].startswith("40\u00a0% of training's time is spent waiting for data: raise")


@pytest.mark.usefixtures("plots")
def test_a_comparison_says_who_is_ahead_and_where_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strong = write_run(tmp_path, num_steps=150)
    weak = write_run(tmp_path, name="rank_16", seed=4, skill=0.3, num_steps=150, model={"lora": {"rank": 16}})
    run_verb(monkeypatch, weak, strong)
    page = tmp_path / "comparison.html"
    assert capsys.readouterr().out == f"comparison: {page}\n"
    text = words(page)
    assert re.search(r"okvqa_qlora has the highest VQA accuracy, [\d.]+ %, [\d.]+ points above rank_16\.", text)
    assert "model.lora.rank 16 128" in text and "same versions on the same hardware" in text
    with pytest.raises(ValueError, match="named twice"):
        write_comparison([strong, strong], page)
    with pytest.raises(SystemExit):
        run_verb(monkeypatch, weak, strong, "--out", tmp_path)
    assert f"--out {tmp_path} is a folder. Name a file in it" in capsys.readouterr().err


@pytest.mark.usefixtures("plots")
def test_a_run_without_held_out_data_has_a_report_too(tmp_path: Path) -> None:
    run = write_run(tmp_path, evaluations=False, num_steps=30, data={"eval": ""}, eval={"metric": "loss"})
    text = words(write_report(run))
    assert "the recipe names no held-out data" in text and "Answers" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.toml", None, "is not a run"),
        ("metrics.jsonl", "[1]\n", "was not written by a run"),
        ("environment.json", "{", "is damaged"),
        ("predictions/step-000050.jsonl", "{", "is damaged"),
    ],
)
def test_what_is_wrong_with_a_run_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    name: str, content: str | None, message: str,
) -> None:  # fmt: skip
    run = write_run(tmp_path, num_steps=50)
    (run / name).unlink() if content is None else (run / name).write_text(content)
    with pytest.raises(SystemExit) as ended:
        run_verb(monkeypatch, run)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("plots")
@pytest.mark.parametrize(("every", "steps"), [(0.0, ["1", "2"]), (30.0, ["1"])], ids=["always", "seldom"])
def test_a_run_writes_its_report_at_evaluations_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], every: float, steps: list[str]
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(validation, "_REPORT_EVERY", every)
    write = live.write_report

    def noted(*arguments: object) -> Path:
        page = write(*arguments)  # pyright: ignore[reportArgumentType]
        texts.append(words(page))
        return page

    monkeypatch.setattr(live, "write_report", noted)
    data = {"eval": str(PARITY / "traj_lora.json")}
    evaluation = {"every": 1, "at_start": True}
    verb.train(recipe(tmp_path, data=data, eval=evaluation, train={"max_steps": 3, "epochs": 3}))
    running = [re.search(r"running: step (\d) of 3", text) for text in texts]
    assert [step and step[1] for step in running] == [*steps, None], "the first step waits for no report"
    assert "after 3 steps" in texts[-1]
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out


def test_a_report_that_fails_is_said_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, evaluation = {"eval": str(PARITY / "traj_lora.json")}, {"every": 1, "limit": 2}
    settings = recipe(tmp_path, data=data, eval=evaluation, train={"max_steps": 2, "epochs": 2})
    write_run_files(settings, build_accelerator(settings))  # else the folder would not be a run's
    (tmp_path / "run" / "report.html").mkdir()
    state = verb.train(settings)
    assert state.step == 2 and (tmp_path / "run" / "export" / "adapter_model.safetensors").is_file()
    assert capsys.readouterr().out.count("report: not written (IsADirectoryError") == 2


def test_a_run_that_overfits_says_so_once_and_the_report_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loss of held-out data rises from the second evaluation on, and has a dip after the note.
    losses = iter([2.0, 1.0, 1.2, 1.4, 1.6, 0.9, 1.2, 1.4, 1.6, 1.8, 2.0])
    evaluate = validation.evaluate

    def scripted(*arguments: Any) -> Evaluation:
        evaluation = evaluate(*arguments)
        return replace(evaluation, metrics=evaluation.metrics | {"loss": next(losses)})

    monkeypatch.setattr(validation, "evaluate", scripted)
    records = json.loads((PARITY / "traj_lora.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records[:2]))
    (tmp_path / "eval.json").write_text(json.dumps(records[4:6]))
    data = {"train": str(tmp_path / "train.json"), "eval": str(tmp_path / "eval.json")}
    train = {"per_device_batch_size": 2, "max_steps": 20, "epochs": 20}
    verb.train(recipe(tmp_path, data=data, eval={"every": 2, "limit": 2}, train=train))
    assert capsys.readouterr().out.count("note: overfitting: evaluation loss has risen since step 4") == 1
    assert "Overfitting: evaluation loss has risen since step 12" in words(tmp_path / "run" / "report.html")


def test_who_is_taken_for_whom_stands_in_a_table_where_classes_are_scored(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path, num_steps=50, eval={"metrics": ["classification"]})).read_text()
    assert 'id="confusion"' in page and '<th scope="col"><bdi>triangle</bdi></th>' in page
    assert 'id="confusion"' not in write_report(write_run(tmp_path / "other", num_steps=50)).read_text()
