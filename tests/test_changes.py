"""The five changes of recipes/README.md, typed in as they stand there, and what each of them does to a run."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from safetensors.torch import load_file

import llava_accel.train as verb
from helpers.runs import PARITY, metrics, recipe
from helpers.samples import write_lines
from helpers.verbs import start, write_recipe
from llava_accel.exceptions import UserError
from llava_accel.model.objective import Objective

RECIPES = Path(__file__).parents[1] / "recipes"
PAGE = (RECIPES / "README.md").read_text()
SECTION = PAGE.partition("## Five changes, worked through\n")[2].partition("\n## ")[0]
CHANGES = {part.partition("\n")[0]: part for part in SECTION.split("\n### ")[1:]}
LORA: dict[str, Any] = {"adapter": "", "train_projector": False}
FLAT = {"schedule": "constant", "warmup_fraction": 0.0}


def block(title: str, language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", CHANGES[title], re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return found[0]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def typed_in(title: str) -> dict[str, dict[str, Any]]:
    """Write the file of a change here; what it changes in a recipe."""
    code = block(title, "python")
    assert len(code.splitlines()) <= 20
    Path(code.splitlines()[0].removeprefix("# ")).write_text(code)
    return tomllib.loads(block(title, "toml"))


def trained_with(folder: Path, title: str | None = None, **changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of a run of four steps, with a change or without."""
    added = typed_in(title) if title else {}
    settings = {"model": LORA, "optim": FLAT, "train": {"max_steps": 4, "per_device_batch_size": 2}, **changes}
    for table, keys in added.items():
        settings[table] = {**settings.get(table, {}), **keys}
    verb.train(recipe(folder, **settings))
    return metrics(folder / "run")


def test_there_are_five(tmp_path: Path) -> None:
    titles = ["A KL term", "Another loss", "Another optimizer", "Another metric", "Other data", "From a notebook"]
    assert list(CHANGES) == titles


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_kl_term(tmp_path: Path, accumulation: int) -> None:
    split = {"max_steps": 4, "per_device_batch_size": 2 // accumulation, "accumulation_steps": accumulation}
    lines = trained_with(tmp_path / "kl", "A KL term", train=split)
    plain = trained_with(tmp_path / "plain", train=split)
    assert abs(lines[0]["kl"]) < 1e-6 and lines[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert all(line["kl"] > 1e-4 for line in lines[2:])
    # Held to the base: what is learned of the answers comes out a little less.
    assert lines[3]["loss"] - 0.1 * lines[3]["kl"] != pytest.approx(plain[3]["loss"], rel=1e-6)


def test_another_loss(tmp_path: Path) -> None:
    lines, plain = trained_with(tmp_path / "a", "Another loss"), trained_with(tmp_path / "b")
    # Before the first update: 0.9 of the cross-entropy, and 0.1 of its mean over all tokens, about the same here.
    assert lines[0]["loss"] != plain[0]["loss"] and lines[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.05)
    assert lines[3]["loss"] < lines[0]["loss"]


def test_another_optimizer(tmp_path: Path) -> None:
    trained_with(tmp_path, "Another optimizer")
    (engine,) = (tmp_path / "run" / "checkpoints").glob("*/engine/optimizer*.safetensors")
    kept = {name.rpartition("//")[2] for name in load_file(engine)}
    assert {"row_var", "col_var", "step"} <= kept and "exp_avg" not in kept


def test_another_metric(tmp_path: Path) -> None:
    lines = trained_with(tmp_path, "Another metric", data={"eval_fraction": 0.25}, eval={"every": 4})
    assert {"exact_match", "my_metric.py:starts_right"} <= lines[-1]["eval"].keys()


def test_other_data(tmp_path: Path) -> None:
    row = json.loads(re.findall(r"Rows such as `(\{.*?\})`", CHANGES["Other data"])[0])
    rows = [row | {"photo": f"t{n}", "ok": n != 3} for n in range(8)]
    added = typed_in("Other data")
    file = write_lines(tmp_path / "rows.jsonl", rows)
    made = recipe(tmp_path, file, data=added["data"], model=LORA, train={"max_steps": 2})
    assert verb.train(made).step == 2
    assert "row 4: data.reader returns None" in (tmp_path / "run" / "skipped.txt").read_text()


def test_the_notebook(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(PARITY / "images" / "t0.png", "photo.png")
    write_recipe(tmp_path, data={"eval_fraction": 0.25})
    monkeypatch.delattr("llava_accel.train")  # modules that other tests have imported; a notebook has not
    monkeypatch.delattr("llava_accel.evaluate", raising=False)
    made: dict[str, Any] = {}
    exec(block("From a notebook", "python"), made)
    assert [line["step"] for line in made["lines"] if "loss" in line] == [1, 2]
    assert f"\n2 {made['found'].metrics['loss']} " in capsys.readouterr().out


def test_the_shipped_loss_is_what_it_says(tmp_path: Path) -> None:
    name = f"{RECIPES / 'my_loss.py'}:Focal"
    one = trained_with(tmp_path / "a", train={"max_steps": 1, "per_device_batch_size": 8, "objective": name})
    plain = trained_with(tmp_path / "b", train={"max_steps": 1, "per_device_batch_size": 8})
    assert one[0]["cross_entropy"] == pytest.approx(plain[0]["loss"], rel=1e-6) and one[0]["loss"] < plain[0]["loss"]
    seen: list[float] = []

    class Focal(Objective):
        def loss(self, hidden: Any, batch: Any) -> Any:
            logits = self.llava.lm_head(hidden)[:, : self.vocab_size].float()
            p = F.softmax(logits.detach(), -1).gather(1, batch["target_ids"][:, None])[:, 0]
            seen.append(float((-((1 - p) ** 2) * p.log()).mean()))
            return super().loss(hidden, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llava_accel.model.task.Objective", Focal)
        trained_with(tmp_path / "c", train={"max_steps": 1, "per_device_batch_size": 8})
    assert one[0]["loss"] == pytest.approx(seen[0], rel=1e-5)


@pytest.mark.parametrize("title", ["A KL term", "Another loss"])
def test_other_verbs_know_an_objective_of_ones_own(tmp_path: Path, title: str) -> None:
    objective = typed_in(title)["train"]["objective"]
    path = str(
        write_recipe(tmp_path, model=LORA, data={"eval_fraction": 0.25}, train={"objective": objective, "max_steps": 2})
    )
    for verb_name in ("check", "plan", "train", "evaluate"):
        ended = start(verb_name, path)
        assert ended.code == 0, ended.out + ended.err
        assert " ".join(ended.out.split()).count(f"{objective} is code of yours") == (verb_name != "plan")
    Path(objective.partition(":")[0]).write_text("class Smoothed: ...\nclass WithKL: ...\n")
    Path("spoilt.json").write_text("no records")
    for verb_name in ("check", "train"):
        ended = start(verb_name, path, "data.train=spoilt.json")  # said before any data is read
        assert ended.code == 2 and "not a class that inherits from" in ended.messages[0]


def test_a_loss_that_has_changed_is_noticed_when_a_run_resumes(tmp_path: Path) -> None:
    added = typed_in("Another loss")["train"]
    made = recipe(tmp_path, model=LORA, optim=FLAT, train={"max_steps": 1, **added})
    assert verb.train(made).step == 1
    with Path("my_smoothing.py").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"the file of train\.objective has changed since"):
        verb.train(recipe(tmp_path, model=LORA, optim=FLAT, train={"max_steps": 2, **added}))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return hidden @ hidden", "my_own.py, line 4: RuntimeError: "),
        ("self.x.y", "my_own.py, line 4: AttributeError: 'Mine' object has no attribute 'x'"),
        ("return batch['ids']", "my_own.py, line 4: KeyError: 'ids'. Correct it"),
    ],
)
def test_a_loss_that_fails_is_told_with_its_line(tmp_path: Path, body: str, says: str) -> None:
    text = "from llava_accel.model.objective import Objective\nclass Mine(Objective):\n    def loss(self, hidden, batch):\n"
    Path("my_own.py").write_text(f"{text}        {body}\n")
    path = str(write_recipe(tmp_path, model=LORA, train={"objective": "my_own.py:Mine"}))
    for name in ("plan", "train"):
        ended = start(name, path)
        assert ended.code == 2 and says in ended.messages[0] and "Traceback" not in ended.err, ended.err
