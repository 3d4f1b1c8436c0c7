"""Rows that a function of the user's own reads: the shipped example, the whole way through a run, and what goes wrong."""

import json
import pickle
from pathlib import Path

import pytest

from helpers.runs import metrics, recipe, talk, without_times
from helpers.samples import write_lines
from helpers.verbs import start, write_recipe
from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import find_images
from llava_accel.data.own_rows import open_reader
from llava_accel.data.row_forms import RowForm
from llava_accel.data.survey import survey
from llava_accel.exceptions import UserError
from llava_accel.recipe import RecipeError, make_recipe
from llava_accel.setup.datasets import bad_records, row_form
from llava_accel.sources.named import Named
from llava_accel.sources.problems import DataError
from llava_accel.train import train

EXAMPLE = f"{Path(__file__).parents[2] / 'recipes' / 'my_data.py'}:read"
THEIRS = [{"n": n, "pic": f"t{n % 8}", "say": "red" if n % 2 else "blue"} for n in range(12)]
READ = """
def read(row):
    if row["n"] >= 10:
        return None
    return {"id": f"r{row['n']}", "question": "What do you see?", "answer": row["say"], "image": row["pic"] + ".png"}
"""


def reader(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return f"{folder / name}:read"


def opened(folder: Path, name: str, rows: list[dict[str, object]]) -> Corpus:
    source = Named(str(write_lines(folder / "rows.jsonl", rows)))
    return Corpus(open_sources([source], folder / "cache"), find_images, RowForm(reader=open_reader(name)))


def test_the_shipped_example_makes_records_and_leaves_some_out(tmp_path: Path) -> None:
    rows = [
        {"scan": "7", "findings": ["effusion"], "quality": "good"},
        {"scan": "8", "findings": [], "quality": "poor"},
    ]
    corpus = opened(tmp_path, EXAMPLE, rows)
    made = corpus.record(0)
    assert (made.id, made.images) == ("7", ("7.png",)) and made.turns[-1].text == "It shows effusion."
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: data\.reader returns None for it") as raised:
        corpus.record(1)
    assert raised.value.kind == "left_out"


def test_a_run_is_that_of_the_same_records_in_a_form_that_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [talk(n, "What do you see?", "red" if n % 2 else "blue", f"t{n % 8}.png") for n in range(10)]
    runs = []
    for folder, rows, name in (("ours", ours, ""), ("theirs", THEIRS, reader(tmp_path, READ))):
        (tmp_path / folder).mkdir()
        file = write_lines(tmp_path / folder / "rows.jsonl", rows)
        # Few rows are left out by whoever reads them, whatever data.on_bad_record says.
        made = recipe(tmp_path / folder, file, data={"reader": name, "eval_fraction": 0.25}, train={"max_steps": 2})
        assert train(made).step == 2
        runs.append(without_times(metrics(tmp_path / folder / "run")))
    assert runs[0] == runs[1]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"{name} is code of yours, which this process runs (sha256 ") == 1
    assert "left out: 2 of 12 records (2 left_out)" in said
    listed = (tmp_path / "theirs" / "run" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 2 and "row 11: data.reader returns None" in listed[0]


def test_check_plan_cache_and_evaluate_read_with_it(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", THEIRS)
    data = {"reader": reader(tmp_path, READ), "eval_fraction": 0.25}
    path = str(write_recipe(tmp_path, file, data=data))
    for verb in ("check", "plan", "cache", "evaluate"):
        ended = start(verb, path)
        assert ended.code == 0, ended.out + ended.err
        assert " ".join(ended.out.split()).count("mine.py:read is code of yours") == 1
    (tmp_path / "mine.py").write_text(READ.replace('row["say"]', 'row["tell"]'))
    ended = start("check", path)
    assert ended.code == 1 and "10 " in ended.out
    assert f"{file}, row 1: data.reader: {tmp_path / 'mine.py'}, line 5: KeyError: 'tell'" in ended.out
    assert start("train", path).messages[0].startswith(f"{file}, row 1: data.reader: {tmp_path / 'mine.py'}, line 5")
    (tmp_path / "mine.py").write_text("raise SystemExit(0)")
    for verb in ("check", "train"):
        ended = start(verb, path)
        assert ended.code == 2 and "mine.py, line 1: SystemExit: 0. Correct the file" in ended.messages[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no file"),
        ("read = 3", "has no function 'read'"),
        ("def read(row:", "line 1: SyntaxError"),
        ("1 / 0", "line 1: ZeroDivisionError"),
        ("import sys\nsys.exit('bye')", "line 2: SystemExit: bye"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_said_with_its_line(tmp_path: Path, text: str | None, says: str) -> None:
    name = f"{tmp_path / 'mine.py'}:read" if text is None else reader(tmp_path, text)
    made = recipe(tmp_path, data={"reader": name})
    with pytest.raises(UserError, match=r"data\.reader: ") as raised:
        row_form(made, Console(False))
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return row['x']", "line 2: KeyError: 'x'. Correct the function"),
        ("import sys; sys.exit(3)", "line 2: SystemExit: 3"),
        ("return read(row)", "RecursionError"),
        ("return [row]", "returns \"[{'n': 0}]\". Return a dict"),
        ("return {'image': {1, 2}}", "returns a value that is not JSON: Object of type set is not JSON serializable"),
        ("return {(1, 2): 3}", "returns a value that is not JSON: keys must be str"),
        ("row['self'] = row; return row", "returns a value that is not JSON: Circular reference"),
        ("return {'question': '\\ud83d', 'answer': 'a'}", "half of a surrogate pair"),
        ("return {'q': 'a'}", "the row is in no other form: it has 'q'"),
        ("return {'image': 7, 'caption': 'a'}", "'image' holds '7'"),
    ],
)
def test_what_a_reader_makes_of_a_row_is_checked_and_told_with_its_place(tmp_path: Path, body: str, says: str) -> None:
    corpus = opened(tmp_path, reader(tmp_path, f"def read(row):\n    {body}\n"), [{"n": 0}])
    with pytest.raises(DataError) as raised:
        corpus.record(0)
    assert str(raised.value).startswith(f"{tmp_path / 'rows.jsonl'}, row 1: ") and says in str(raised.value)


def test_a_reader_may_change_its_argument_and_print(tmp_path: Path) -> None:
    text = "print('hello')\ndef read(row):\n    row['answer'] = row.pop('n')\n    row['question'] = 'q'\n    return row"
    corpus = opened(tmp_path, reader(tmp_path, text), [{"n": "a"}])
    assert [corpus.record(0).turns[-1].text for _ in range(3)] == ["a"] * 3


@pytest.mark.parametrize("state", ["seen = []\n", "import random\nrandom.seed(0)\n"])
def test_a_reader_with_a_state_is_refused_before_rows_are_read(tmp_path: Path, state: str) -> None:
    said = "str(random.random())" if "random" in state else "str(seen.append(1) or len(seen))"
    name = reader(tmp_path, f"{state}def read(row):\n    return {{'question': 'q', 'answer': {said}}}\n")
    with pytest.raises(UserError, match=r"something else for .*rows\.jsonl, row 1 when it was called again"):
        opened(tmp_path, name, [{"n": 0}])


def test_its_content_belongs_to_the_data_and_its_place_does_not(tmp_path: Path) -> None:
    prints = [
        opened(tmp_path, reader(tmp_path, text, name), THEIRS).fingerprint()
        for text, name in ((READ, "a.py"), (READ, "b.py"), (READ.replace("blue", "red") + "\n", "a.py"))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_a_worker_that_starts_later_does_not_read_with_another_file(tmp_path: Path) -> None:
    first = open_reader(name := reader(tmp_path, READ))
    assert first is not None
    sent = pickle.loads(pickle.dumps(first))
    assert json.loads(sent(dict(THEIRS[0])) or b"")["answer"] == "blue"
    second = open_reader(reader(tmp_path, READ + "\n"))
    reader(tmp_path, READ + "\n\n")
    assert second is not None
    with pytest.raises(DataError, match=f"{name} has changed since the data was opened. Start the command again"):
        second(dict(THEIRS[0]))


@pytest.mark.slow
def test_worker_processes_read_what_this_one_reads(tmp_path: Path) -> None:
    rows = [{"n": n % 11, "pic": "p", "say": str(n)} for n in range(1100)]
    text = READ.replace(', "image": row["pic"] + ".png"', "")
    corpus = opened(tmp_path, reader(tmp_path, text), rows)
    here, there = (survey(corpus, workers=workers, decode=False) for workers in (0, 2))
    assert here.errors_by_kind() == there.errors_by_kind() == {"left_out": 100}
    assert (here.record_keys == there.record_keys).all()
    assert bad_records(recipe(tmp_path).data, there) == []


def test_images_by_url_that_a_reader_makes_are_found(tmp_path: Path) -> None:
    text = "def read(row):\n    return {'image': f\"http://host/{row['n']}.png\", 'caption': 'c'}\n"
    assert list(opened(tmp_path, reader(tmp_path, text), [{"n": 1}, {"n": 2}]).rows_with_urls()) == [0, 1]
    assert list(opened(tmp_path, reader(tmp_path, READ), THEIRS).rows_with_urls()) == []


def test_a_run_does_not_go_on_with_a_reader_that_has_changed(tmp_path: Path) -> None:
    file, name = write_lines(tmp_path / "rows.jsonl", THEIRS), reader(tmp_path, READ)
    settings = {"train": {"max_steps": 4}, "optim": {"schedule": "constant", "warmup_fraction": 0.0}}
    first = recipe(tmp_path, file, data={"reader": name}, **settings | {"train": {"max_steps": 1}})
    assert train(first).step == 1
    moved = recipe(tmp_path, file, data={"reader": reader(tmp_path, READ, "moved.py")}, **settings)
    (tmp_path / "moved.py").write_text(READ.replace("What do", "What did"))
    with pytest.raises(UserError, match=r"run\.resume: the data has changed .* or how data\.reader reads them"):
        train(moved)
    (tmp_path / "moved.py").write_text(READ)
    assert train(moved).step == 4


def test_a_recipe_names_a_reader_or_columns() -> None:
    tables_of = {"run": {"name": "x"}, "model": {"base": "b"}}
    with pytest.raises(RecipeError, match="a function in a file such as"):
        make_recipe({**tables_of, "data": {"train": "t", "reader": "my_data.py"}})
    with pytest.raises(RecipeError, match="Both say how a row is read"):
        make_recipe({**tables_of, "data": {"train": "t", "reader": "d.py:f", "columns": {"image": "i"}}})
    with pytest.raises(UserError, match=r"https://host/d\.py is not on this machine"):
        open_reader("https://host/d.py:f")
