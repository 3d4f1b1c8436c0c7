"""A class of the user's own that no step could use, or that would learn nothing, is told what to return instead."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.runs import recipe
from helpers.toys import MIXED, VOCABULARY, batch_of, make_llava
from llava_accel.console.command_line import run
from llava_accel.data.trie import chain
from llava_accel.exceptions import UserError
from llava_accel.model.objective import Objective
from llava_accel.model.task import new_objective
from llava_accel.own_code import explained, load_own

START = "import torch\nfrom llava_accel.model.objective import Objective\nclass Own(Objective):\n"
LOSS = "    def loss(self, hidden, batch): "


@pytest.fixture(scope="module")
def llava() -> nn.Module:
    """One for all."""
    return make_llava()


def made(folder: Path, llava: nn.Module, body: str) -> Objective:
    (folder / "mine.py").write_text(START + body)
    own = recipe(folder, train={"objective": f"{folder / 'mine.py'}:Own"})
    return new_objective(own, llava, VOCABULARY, torch.float32)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (LOSS + "return 1.0", "loss returns '1.0'. Return a sum"),
        (LOSS + "return None", "loss returns 'None'"),
        (LOSS + "return hidden.sum(1)", r"loss returns a tensor of \[\d+\]\. Return a sum"),
        (LOSS + "return torch.ones(())", "does not depend on the model"),
        ("    MEASURES = ('a',)", "leaves no sum of 'a' in self.measured"),
        ("    def count(self, batch): return 3", "count returns '3'. Return a tensor"),
        ("    def __init__(self): pass", "TypeError: .* takes 1 positional argument"),
    ],
)
def test_what_it_returns_is_looked_at(tmp_path: Path, llava: nn.Module, body: str, says: str) -> None:
    batch = batch_of([chain(example) for example in MIXED])
    with pytest.raises(UserError, match=rf"train\.objective: .*mine\.py.*{says}"):
        made(tmp_path, llava, body)(**batch)


def test_errors_of_its_own_are_left_to_whoever_tells_them_of_all_code(tmp_path: Path, llava: nn.Module) -> None:
    objective = made(tmp_path, llava, LOSS + "raise torch.OutOfMemoryError")
    with pytest.raises(torch.OutOfMemoryError):
        objective(**batch_of([chain(example) for example in MIXED]))
    objective = made(tmp_path, llava, LOSS + "raise SystemExit(0)")
    with pytest.raises(SystemExit) as raised:
        objective(**batch_of([chain(example) for example in MIXED]))
    assert "mine.py, line 4: SystemExit: 0. Correct it" in str(explained(raised.value))


def test_ending_the_process_is_an_error_of_the_file_and_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def f():\n    raise SystemExit(0)\n")
    with pytest.raises(SystemExit) as raised:
        run(load_own("optim.optimizer", f"{tmp_path / 'mine.py'}:f"))
    assert raised.value.code == 2 and "mine.py, line 2: SystemExit: 0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        run(sys.exit)
    assert raised.value.code is None


def test_its_count_is_asked_once_a_micro_batch_and_its_loss_has_as_many_terms(tmp_path: Path, llava: nn.Module) -> None:
    batch = batch_of([chain(example) for example in MIXED])
    count = "    asked = 0\n    def count(self, batch):\n        self.asked += 1\n        return super().count(batch)\n"
    objective = made(tmp_path, llava, count)
    for number in (1, 2):
        objective.count(batch)
        objective(**batch)
        assert objective.asked == number
    other = made(tmp_path, llava, count + LOSS + "return hidden.sum(1)")
    other.count(batch)
    with pytest.raises(UserError, match=r"loss returns a tensor of \[\d+\]"):
        other(**batch)


def test_one_that_is_right_is_what_it_was(tmp_path: Path, llava: nn.Module) -> None:
    batch = batch_of([chain(example) for example in MIXED])
    twice = made(tmp_path, llava, LOSS + "return 2 * super().loss(hidden, batch)")
    plain = Objective(llava, VOCABULARY)(**batch).detach()
    assert float(twice(**batch).detach()) == pytest.approx(2 * float(plain), rel=1e-6)
    with torch.no_grad():
        assert float(twice(**batch)) > 0
