"""An optimizer that a function of the user's own makes: it trains, goes on after a resume, and is tried before a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.runs import metrics, recipe, trained, without_times
from helpers.verbs import start, write_recipe
from llava_accel.exceptions import UserError
from llava_accel.loop.optimizer import learning_rates
from llava_accel.loop.own_optimizer import try_own
from llava_accel.recipe import OptimTable
from llava_accel.runtime.launch_profile import Backend, Profile
from llava_accel.train import train

ADAFACTOR = """
import torch
def build(groups, optim):
    return torch.optim.Adafactor(groups, lr=optim.learning_rate)
"""
SUBCLASS = """
import torch
class Mine(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        {}
def build(groups, optim):
    return Mine(groups, lr=optim.learning_rate)
"""
CPU = torch.device("cpu")


def own(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:build"


def test_a_run_goes_on_with_it_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optim = {"optimizer": own(tmp_path, ADAFACTOR), "schedule": "constant", "warmup_fraction": 0.0}
    settings: dict[str, Any] = {"optim": optim, "checkpoint": {"every": 1}, "train": {"max_steps": 3}}
    whole = recipe(tmp_path / "a", **settings)
    assert train(whole).step == 3
    assert "mine.py:build is code of yours" in " ".join(capsys.readouterr().out.split())
    train(recipe(tmp_path / "b", **settings | {"train": {"max_steps": 1}}))
    train(recipe(tmp_path / "b", **settings))
    assert without_times(metrics(tmp_path / "a" / "run")) == without_times(metrics(tmp_path / "b" / "run"))
    one, other = (trained(tmp_path / name / "run" / "export") for name in ("a", "b"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "mine.py").write_text(ADAFACTOR + "\n")
    with pytest.raises(UserError, match=r"the file of optim\.optimizer has changed since .*\. Set it back"):
        train(recipe(tmp_path / "b", **settings | {"train": {"max_steps": 4}}))


def test_what_changes_while_a_run_goes_on_is_noticed_when_it_resumes(tmp_path: Path) -> None:
    """The run has gone on with what the file was, and says so in its checkpoints."""
    optim = {"optimizer": own(tmp_path, ADAFACTOR), "schedule": "constant", "warmup_fraction": 0.0}
    train(
        recipe(tmp_path, optim=optim, train={"max_steps": 1}),
        on_log=lambda _: (tmp_path / "mine.py").write_text(ADAFACTOR + "\n"),
    )
    with pytest.raises(UserError, match=r"the file of optim\.optimizer has changed"):
        train(recipe(tmp_path, optim=optim, train={"max_steps": 2}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def build(groups, optim):\n    return groups", "Return a torch.optim.Optimizer"),
        ("def build(groups):\n    return 1", "TypeError: build() takes 1 positional argument but 2 were given"),
        ("def build(groups, optim):\n    exit(1)", "line 2: SystemExit: 1. Correct the function"),
        (
            "import torch\ndef build(groups, optim):\n    return torch.optim.SGD(groups[:1], lr=1.0)",
            "takes 1 of 2 weights",
        ),
        (
            "import torch\ndef build(groups, _):\n    return torch.optim.LBFGS([p for g in groups for p in g['params']])",
            "in a step. Correct the optimizer",
        ),
        (
            SUBCLASS.format("for p in self.state or [self.param_groups[0]['params'][0]]: self.state[p]['d'] = 0.5"),
            "'d'",
        ),
        (SUBCLASS.format("self.param_groups[0]['d'] = 0.5"), "keeps 'd', which a checkpoint does not hold"),
    ],
)
def test_one_that_does_not_work_is_refused_before_data_and_weights_are_read(
    tmp_path: Path, text: str, says: str
) -> None:
    name = own(tmp_path, text)
    with pytest.raises(UserError, match=r"optim\.optimizer: ") as raised:
        try_own(OptimTable(optimizer=name), CPU)
    assert says in str(raised.value)
    (tmp_path / "spoilt.json").write_text("no records")
    path = str(write_recipe(tmp_path, tmp_path / "spoilt.json", optim={"optimizer": name}))
    for verb in ("check", "train"):
        ended = start(verb, path)
        assert ended.code == 2 and says in ended.messages[0] and "Traceback" not in ended.err


@pytest.mark.parametrize("kind", ["NAdam", "RAdam", "Adamax", "RMSprop", "Adafactor", "ASGD", "Rprop"])
def test_those_of_torch_are_taken(tmp_path: Path, kind: str) -> None:
    name = own(tmp_path, f"import torch\ndef build(groups, optim):\n    return torch.optim.{kind}(groups, lr=1e-3)")
    try_own(OptimTable(optimizer=name), CPU)


def test_groups_without_names_have_one_rate() -> None:
    assert learning_rates(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)) == {"all": 0.5}


def test_it_is_refused_where_weights_are_divided(tmp_path: Path) -> None:
    made = recipe(tmp_path, optim={"optimizer": own(tmp_path, ADAFACTOR)})
    cases: dict[Backend, bool] = {"deepspeed": True, "fsdp": True, "ddp": False, "none": False}
    for backend, refused in cases.items():
        assert Profile(backend, {}).refuses(made) == refused
