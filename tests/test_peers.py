"""The comparison with other trainers: what is installed for them, whose turn it is, what counts as the same loss."""

import sys
from pathlib import Path
from subprocess import Popen

import pytest

from bench.peer_steps.environments import PEERS, Peer, requirements
from bench.peer_steps.stepper import TESTS, Stepper
from bench.peers import NUM_LOSSES, Pair, compare, make_rows, report

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
        "pairs": "",
    }
    return {**common, "base": str(QUICKSTART), "rows": str(rows)}


def stepper(title: str, loss: float, peak_mib: float = 100.0) -> Stepper:
    with Popen([sys.executable, "-c", ""], text=True) as process:
        pass
    return Stepper(title, "the same", process, Path("log"), losses=[loss], peak_mib=peak_mib)


def pair(loss: float) -> Pair:
    theirs, ours = stepper("theirs", loss, peak_mib=200.0), stepper("ours", 2.0)
    return Pair(theirs, ours, [(4.0, 8.0), (4.0, 8.0)], [(2.0, 4.0), (1.0, 4.0)], [(1.0, 2.0), (1.0, 2.0)])


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


def test_ratios_are_of_the_same_round() -> None:
    found = report(pair(2.0))
    assert found["ratios"] == {"wall_cold": 3.0, "wall_warm": 4.0, "cpu_cold": 2.0, "cpu_warm": 4.0}
    assert found["memory"] == 0.5


@pytest.mark.parametrize(("loss", "is_same"), [(2.0003, True), (2.001, False)])
def test_another_first_loss_is_said(loss: float, is_same: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(pair(loss))["same_first_loss"] is is_same
    assert ("DIFFERS" in capsys.readouterr().out) is not is_same


@pytest.mark.slow
def test_a_trainer_and_ours_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {"broken": "raise SystemExit('no such module')", "talking": TRAINER}
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    peers = {name: Peer(name, "none==0", str(tmp_path / f"{name}.py")) for name in scripts}
    monkeypatch.setattr("bench.peers.python_of", lambda peer, cache: Path(sys.executable))
    found = list(compare(peers, tmp_path, tmp_path, settings(tmp_path), 2))
    assert "broken: not measured" in capsys.readouterr().out
    assert [line["title"] for line in found] == ["talking"]
    ours, theirs = found[0]["ours"], found[0]["theirs"]
    assert ours["losses"][0] > ours["losses"][1] > ours["losses"][2]
    assert len(theirs["losses"]) == NUM_LOSSES and (theirs["losses"][0], theirs["trained"]) == (1.0, 1)
    times = found[0]["seconds_and_cpu_seconds"]
    assert {name: len(values) for name, values in times.items()} == {"step": 2, "cold": 2, "warm": 2}
    assert all(seconds > 0 for values in times.values() for seconds, _ in values)
    assert "a peer that talks" in (tmp_path / "talking.log").read_text()
