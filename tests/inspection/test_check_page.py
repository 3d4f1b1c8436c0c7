"""`check` from the command line: what it prints fits a terminal, and its page shows everything and trusts nothing."""

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from helpers.runs import talk
from helpers.verbs import assert_refused, start, write_recipe

EVIL = '\u202e<script>alert(1)</script> \x1b[31m"'


class Page(HTMLParser):
    """What of a page is seen, and what it would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.learned: list[str] = []
        self._is_learned = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_learned = ("class", "learned") in attrs

    def handle_data(self, data: str) -> None:
        if self._is_learned:
            self.learned.append(data)
        self._is_learned = False


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve good records with two images, five that cannot be used, and hostile texts."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 30), colour).save(tmp_path / name)
    rows = [
        talk(number, f"What {number}?", "red" if number % 4 else EVIL, "ab"[number % 2] + ".png")
        for number in range(12)
    ]
    rows += [{"id": EVIL} for _ in range(4)] + [talk(99, "Q", "A", f"{EVIL}.png")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text(json.dumps(talk(1, "Which?", "red", "a.png")) + "\n")
    return tmp_path


def recipe(folder: Path, **changes: object) -> str:
    settings = {"images": str(folder), "eval": str(folder / "eval.jsonl"), "on_bad_record": "skip", "max_bad": 1.0}
    return str(write_recipe(folder, folder / "data.jsonl", data=settings | changes))


def test_what_is_printed_has_counts_lengths_answers_and_the_length_of_the_run(data: Path) -> None:
    ended = start(
        "check", recipe(data), "train.epochs=2", "train.per_device_batch_size=2", "train.accumulation_steps=2"
    )
    assert ended.code == 0, ended.err
    assert re.search(r"images +│ +12 shown, 2 different", ended.out)
    assert "answers, 2 different (the commonest alone scores 75.0%):" in ended.out
    assert "fields: and 1 more, all listed by --fix DIR" in ended.out
    assert "1 of 1 evaluation records show an image that training shows too" in ended.out
    assert "run: 6 steps of 4 examples, which is 2 epochs of 3 steps, on one process." in ended.out
    bars = [line for line in ended.out.splitlines() if re.search(r"  #+ ", line)]
    assert len(bars) > 3 and all(len(line) <= 80 for line in bars)


def test_the_last_line_is_the_command_that_follows_quoted_for_the_shell(data: Path) -> None:
    words = ["run.output_dir=it's a run", 'data.exif="apply"']
    last = start("check", recipe(data), *words).out.splitlines()[-1]
    assert shlex.split(last) == ["next:", "llava-accel", "train", str(data / "recipe.toml"), *words]


def test_the_page_shows_everything_and_loads_and_runs_nothing(data: Path) -> None:
    ended = start("check", recipe(data), "--html", str(data / "page.html"))
    assert ended.code == 0 and f"page: {data / 'page.html'}" in ended.out, ended.err
    text = (data / "page.html").read_text()
    page = Page(text)
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 13 and all((source or "").startswith("data:image/jpeg;base64,") for source in sources)
    assert not [tag for tag, each in page.tags if (each.get("src") or each.get("href") or "").startswith("http")]
    assert [tag for tag, _ in page.tags].count("script") == 1  # the frame's own
    assert "default-src 'none'" in text and "&lt;script&gt;" in text and "\\u202e" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert page.learned.count("red</s>") == 10 and page.learned.count("marked") == 2 and len(page.learned) == 15
    text = text.replace("\u00a0", " ")
    assert "12 shown, 2 different" in text and "75.0 %" in text and "fields: 4" in text and "and 1 more" in text
    assert "2 of" not in text and "1 of 1 evaluation records" in text and "steps of" in text


def test_the_page_is_there_where_the_data_is_wrong(data: Path) -> None:
    ended = start("check", recipe(data, on_bad_record="error"), "--html", str(data / "page.html"))
    assert ended.code == 1 and "fields: 4" in (data / "page.html").read_text()


def test_a_page_in_no_folder_is_refused_before_anything_is_read(data: Path) -> None:
    ended = start("check", recipe(data), "--html", str(data / "none" / "page.html"))
    assert ended.code == 2 and "there is no folder" in ended.err and not ended.out


def test_a_tracker_that_is_not_installed_is_said_with_its_command(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "swanlab" else name)
    ended = start("check", recipe(data), 'log.trackers=["tensorboard", "swanlab"]')
    assert "note: log.trackers: not installed, so not used: swanlab. Run: pip install swanlab" in ended.out


def test_a_share_that_leaves_no_evaluation_is_refused(data: Path) -> None:
    (data / "data.jsonl").write_text(json.dumps(talk(1, "Q", "A", "a.png")) + "\n")
    assert_refused(start("check", recipe(data, eval="", eval_fraction=0.5)), ["data.eval_fraction = 0.5", "Choose"])


@pytest.mark.slow
def test_the_probe_says_seconds_and_time_of_the_whole_run(data: Path) -> None:
    ended = start("check", recipe(data), "--probe", "train.max_steps=1000", 'log.trackers=["tensorboard"]')
    (line,) = [line for line in ended.out.splitlines() if line.startswith("probe: ")]
    found = re.fullmatch(r"probe: ([\d.e-]+) seconds per step, ([\d.]+) (minutes|hours) in all on this .*", line)
    assert found and ended.code == 0, line + ended.err
    whole = float(found[2]) * (60 if found[3] == "minutes" else 3600)
    assert whole <= 1000 * float(found[1]) * 1.2  # later epochs find the features of their images kept
    assert not (data / "run").exists()


@pytest.mark.parametrize("flag", ["--labels", "--html", "--mend"])
def test_broken_input_a_file_that_cannot_be_written_is_refused_before_the_data_are_read(data: Path, flag: str) -> None:
    for name, says in (("/proc/out", "cannot be written ("), (".", "is a folder. Name a file in it")):
        against = ["--against", str(data)] if flag == "--mend" else []
        ended = start("check", recipe(data), *against, flag, str(data / name))
        assert_refused(ended, [flag, says])
        assert "reading" not in ended.out
