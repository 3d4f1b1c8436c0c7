"""The report shows the training examples that the finished model finds hardest: a wrong label is among them."""

import json
import re
from pathlib import Path

import llava_accel.train as verb
from helpers.runs import recipe, talk, write_records


def test_a_wrong_label_is_the_first_of_the_worst_training_examples(tmp_path: Path) -> None:
    records = [talk(number, "What is it?", "red", f"t{number % 8}.png") for number in range(15)]
    records.append(talk("wrong", "What is it?", "a small circle on the left of two squares", "t3.png"))
    data = write_records(tmp_path / "data.json", records)
    train = {"epochs": 8, "per_device_batch_size": 8}
    verb.train(recipe(tmp_path, data, train=train, eval={"train_limit": 16, "every": 1000}))
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "predictions" / "training.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert max(rows, key=lambda row: row["loss"])["id"] == "rwrong"
    page = (run / "report.html").read_text()
    _, _, section = page.partition('<section id="training">')
    assert re.findall(r'class="id">(\w+)<', section)[0] == "rwrong"


def test_without_a_limit_there_is_neither_file_nor_section(tmp_path: Path) -> None:
    verb.train(recipe(tmp_path, train={"max_steps": 1}))
    assert not (tmp_path / "run" / "predictions" / "training.jsonl").exists()
    assert '<section id="training">' not in (tmp_path / "run" / "report.html").read_text()
