"""A record that cannot be used is named with file, row, id and remedy, or left out by the recipe's word and counted."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from helpers.broken_rows import FILES, GPT, HUMAN, LINES, MALFORMED, TEXT_ONLY
from helpers.runs import metrics
from helpers.verbs import assert_helpful, assert_refused, start, write_recipe

GOOD = [TEXT_ONLY | {"id": f"good {number}"} for number in range(3)]


def raw(name: str) -> bytes:
    """One case as a line; objects carry an id."""
    if name in LINES:
        return LINES[name][0]
    row = MALFORMED[name][0]
    return json.dumps({"id": "the one"} | row if isinstance(row, dict) else row).encode()


def words(name: str) -> list[str]:
    """What the message of a case has to say."""
    if name in LINES:
        return [LINES[name][1]]
    row, _, word = MALFORMED[name]
    return [word, "(id 'the one')"] if isinstance(row, dict) and "id" not in row else [word]


def write(path: Path, *rows: bytes) -> Path:
    path.write_bytes(b"\n".join([*(json.dumps(record).encode() for record in GOOD), *rows]) + b"\n")
    return path


@pytest.mark.parametrize("name", [*MALFORMED, *LINES])
def test_broken_input_a_record(tmp_path: Path, name: str) -> None:
    data = write(tmp_path / "data.jsonl", raw(name), raw(name))
    ended = start("train", str(write_recipe(tmp_path, data)))
    assert_refused(ended, [f"{data}, row 4", *words(name), "1 more of 5 records cannot be used", "on_bad_record"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", FILES)
def test_broken_input_a_data_file(tmp_path: Path, name: str) -> None:
    file, content, says = FILES[name]
    (tmp_path / file).write_bytes(content())
    assert_refused(start("train", str(write_recipe(tmp_path, tmp_path / file))), [str(tmp_path / file), *says])
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("name", ["nothing.json", "nothing.jsonl", "empty folder", "x" * 300 + ".json"])
def test_broken_input_no_data_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty folder").mkdir()
    assert_refused(start("train", str(write_recipe(tmp_path, tmp_path / name))), [name[:20], "data"])


def test_broken_input_ids_that_stand_twice(tmp_path: Path) -> None:
    rows = [json.dumps(record).encode() for record in (GOOD[1], TEXT_ONLY, TEXT_ONLY, GOOD[1])]
    data = write(tmp_path / "data.jsonl", *rows)
    ended = start("check", str(write_recipe(tmp_path, data)))
    assert ended.code == 0 and not ended.messages
    lines = [line.strip() for line in ended.out.splitlines() if "has the same id" in line]
    assert [line.split(": row")[0] for line in lines] == [f"{data}, row {row} (id 'good 1')" for row in (4, 7)]
    assert all("row 2 has the same id" in line for line in lines)
    for line in lines:
        assert_helpful(line, ["Give each record its own"])
    # Nothing of them is lost: they are trained on as they are, and a clean copy holds them under ids of their own.
    start("check", str(write_recipe(tmp_path, data)), "--fix", str(tmp_path / "clean"))
    fixed = tmp_path / "clean" / "data.jsonl"
    found = [json.loads(line) for line in fixed.read_text().splitlines()]
    assert [row.get("id") for row in found][3:] == ["good 1-row4", None, None, "good 1-row7"]
    assert all(row["conversations"] == TEXT_ONLY["conversations"] for row in found)
    assert start("check", str(write_recipe(tmp_path, fixed))).code == 0


def test_broken_input_a_mark_before_the_first_byte_loses_nothing(tmp_path: Path) -> None:
    for file, text in {"a.json": json.dumps(GOOD), "a.jsonl": "\n".join(map(json.dumps, GOOD))}.items():
        (tmp_path / file).write_text(text, encoding="utf-8-sig")
        ended = start("check", str(write_recipe(tmp_path, tmp_path / file)), "--labels", str(tmp_path / "labels"))
        assert ended.code == 0 and not ended.messages
        ids = [json.loads(line)["id"] for line in (tmp_path / "labels").read_text().splitlines()]
        assert ids == ["good 0", "good 1", "good 2"]


@pytest.fixture
def all_of_them(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", *map(raw, [*MALFORMED, *LINES]))


def test_check_says_all_of_them_in_one_pass(tmp_path: Path, all_of_them: Path) -> None:
    ended = start("check", str(write_recipe(tmp_path, all_of_them)), "--fix", str(tmp_path / "copy"))
    assert ended.code == 1 and not ended.messages
    listed = (tmp_path / "copy" / "left_out.txt").read_text().splitlines()
    for row, name in enumerate([*MALFORMED, *LINES], start=len(GOOD) + 1):
        (line,) = [line for line in listed if re.search(rf", row {row}\b", line)]
        assert_helpful(line, words(name))
    kinds = Counter([kind for _, kind, _ in MALFORMED.values()] + ["json"] * len(LINES))
    shown = [line.strip() for line in ended.out.splitlines() if line.strip() in listed]
    assert len(shown) == sum(min(count, 3) for count in kinds.values())
    assert all(f"{kind}: and {count - 3} more" in ended.out for kind, count in kinds.items() if count > 3)
    assert f"{len(MALFORMED) + len(LINES) + len(GOOD):,}" in ended.out


def test_what_the_recipe_leaves_out_is_counted_and_listed(tmp_path: Path, all_of_them: Path) -> None:
    changes = {"data": {"on_bad_record": "skip", "max_bad": 1.0}}
    ended = start("train", str(write_recipe(tmp_path, all_of_them, **changes)))
    assert ended.code == 0, ended.err
    kinds = Counter([kind for _, kind, _ in MALFORMED.values()] + ["json"] * len(LINES))
    bad = kinds.total()
    assert f"left out: {bad} of {bad + len(GOOD)} records" in ended.out
    assert all(f"{count} {kind}" in ended.out for kind, count in kinds.items())
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert len(listed) == bad
    assert metrics(tmp_path / "run")[-1]["num_examples"] == len(GOOD)


def test_more_than_the_recipe_leaves_out_is_refused(tmp_path: Path, all_of_them: Path) -> None:
    recipe = str(write_recipe(tmp_path, all_of_them, data={"on_bad_record": "skip", "max_bad": 0.1}))
    for verb in ("train", "check"):
        assert_refused(start(verb, recipe), [str(all_of_them), "more than data.max_bad = 0.1 allows"])


def test_the_cases_are_what_the_loader_accepts_but_for_their_one_fault(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", json.dumps({"id": "the one", "conversations": [HUMAN, GPT]}).encode())
    assert start("check", str(write_recipe(tmp_path, data))).code == 0
