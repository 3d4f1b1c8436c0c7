"""A class of the user's own that no step could use, or that would learn nothing, is told what to return instead."""

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.runs import recipe
from helpers.toys import MIXED, VOCABULARY, batch_of, make_llava
from llava_accel.data.trie import chain
from llava_accel.exceptions import UserError
from llava_accel.model.objective import Objective
from llava_accel.model.task import new_objective

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
        (LOSS + "raise SystemExit(0)", "line 4: SystemExit: 0. Mend the class"),
        ("    MEASURES = ('a',)", "leaves no sum of 'a' in self.measured"),
        ("    def count(self, batch): return 3", "count returns '3'. Return a tensor"),
        ("    def count(self, batch): exit()", "SystemExit"),
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


def test_one_that_is_right_is_what_it_was(tmp_path: Path, llava: nn.Module) -> None:
    batch = batch_of([chain(example) for example in MIXED])
    twice = made(tmp_path, llava, LOSS + "return 2 * super().loss(hidden, batch)")
    assert float(twice(**batch)) == pytest.approx(2 * float(Objective(llava, VOCABULARY)(**batch)), rel=1e-6)
    with torch.no_grad():
        assert float(twice(**batch)) > 0
