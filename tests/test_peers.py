"""The comparison with other trainers: what is installed for them, whose turn it is, what counts as the same loss."""

import json
import sys
from pathlib import Path
from subprocess import Popen

import pytest

from bench.peer_steps.environments import PEERS, Peer, requirements
from bench.peers import NUM_LOSSES, TESTS, Row, Stepper, make_rows, report, start_all, take_turns, turned

QUICKSTART = TESTS.parent / "llava_accel" / "quickstart" / "base"
TRAINER = """
import torch
from transformers import Trainer, TrainingArguments

from bench.peer_steps.gate import Gate, common_arguments
from bench.peer_steps.turnstile import Turnstile, settings


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return {"loss": ((self.weight - x) ** 2).mean()}


turnstile = Turnstile()
print("a peer that talks")
arguments = TrainingArguments(**common_arguments(settings()))
Trainer(Model(), arguments, train_dataset=[{"x": 1.0}] * 2, callbacks=[Gate(turnstile)]).train()
"""


def settings(folder: Path) -> dict[str, str]:
    rows = make_rows(folder, 4, questions=2)
    common = {
        "rank": "4",
        "alpha": "8",
        "dropout": "0.0",
        "learning_rate": "1e-3",
        "batch": "4",
        "share_prefix": "true",
    }
    return {**common, "base": str(QUICKSTART), "rows": str(rows)}


def stepper(title: str, loss: float, peak_mib: float = 100.0) -> Stepper:
    with Popen([sys.executable, "-c", ""]) as process:
        pass
    return Stepper(title, "the same", process, Path("log"), losses=[loss], peak_mib=peak_mib)  # pyright: ignore


def rows_of(loss: float) -> list[Row]:
    ours, theirs = stepper("ours", 2.0), stepper("theirs", loss, peak_mib=200.0)
    return [
        Row(ours, "cold", "cold", [2.0, 1.0], [3.0, 3.0]),
        Row(ours, "warm", "warm", [1.0, 1.0], [2.0, 2.0]),
        Row(theirs, "theirs", "step", [4.0, 4.0], [8.0, 8.0]),
    ]


def test_what_would_bring_another_torch_is_not_installed() -> None:
    peer = Peer("a", "a==1", "a.py", left_out=("gradio",), more=("pillow",))
    named = [
        "torch>=2",
        "torchvision",
        "gradio<6",
        "peft<0.21,>=0.11",
        'ray; extra == "ray"',
        'x; python_version < "3"',
    ]
    assert requirements(named, peer) == ["peft<0.21,>=0.11", "pillow"]
    assert all("==" in peer.package for peer in PEERS.values())


def test_each_row_has_one_turn_a_round_and_kept_features_come_after_computed_ones() -> None:
    rows = [Row(stepper("ours", 1.0), title, "step") for title in ("cold", "warm", "a", "b")]
    rounds = [[row.title for row in turned(rows, number)] for number in range(4)]
    assert rounds[:3] == [["cold", "warm", "a", "b"], ["a", "b", "cold", "warm"], ["b", "cold", "warm", "a"]]
    assert rounds[3] == rounds[0]


def test_ratios_are_of_the_same_round() -> None:
    *_, theirs = report(rows_of(2.0))
    assert (theirs["ratio_cold"], theirs["ratio_warm"], theirs["ratio_memory"]) == (3.0, 4.0, 0.5)


@pytest.mark.parametrize(("loss", "is_same"), [(2.0003, True), (2.001, False)])
def test_another_first_loss_is_said(loss: float, is_same: bool, capsys: pytest.CaptureFixture[str]) -> None:
    *_, theirs = report(rows_of(loss))
    assert theirs["same_first_loss"] is is_same
    assert ("DIFFERS" in capsys.readouterr().out) is not is_same


@pytest.mark.slow
def test_a_trainer_and_ours_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    (tmp_path / "broken.py").write_text("raise SystemExit('no such module')")
    peers = {name: Peer(name, "none==0", str(tmp_path / name)) for name in ("trainer.py", "broken.py")}
    monkeypatch.setattr("bench.peers.python_of", lambda peer, cache: Path(sys.executable))
    steppers = start_all(peers, tmp_path, tmp_path, settings(tmp_path))
    assert list(steppers) == ["ours", "trainer.py"]
    rows = take_turns(steppers, 2)
    for each in steppers.values():
        each.stop()
    assert [row.title for row in rows[2:]] == ["trainer.py"]
    assert all(len(row.seconds) == len(row.cpu_seconds) == 2 and min(row.seconds) > 0 for row in rows)
    ours, theirs = steppers.values()
    assert len(ours.losses) == len(theirs.losses) == NUM_LOSSES
    assert ours.losses[0] > ours.losses[1] > ours.losses[2] and theirs.losses[0] == 1.0
    assert "a peer that talks" in theirs.log.read_text()
    assert json.loads(json.dumps(report(rows)))[2]["trained"] == 1
