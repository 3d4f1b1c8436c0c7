"""What crosses between ranks in a step: gradients of trained weights, once a window where the engine allows it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.ranks_worker import compare_ranks
from helpers.forked import Forked
from helpers.jobs import ENGINES, LAUNCH, STEPS, Lab, weights
from llava_accel.recipe import make_recipe

pytestmark = pytest.mark.slow

SUMS = ("allreduce", "reducescatter", "reduce")


def sent(run: Path, *, last: bool, kinds: tuple[str, ...] = SUMS) -> list[int]:
    """Bytes that rank 0 sent in each micro-batch that is, or is not, the last of its window."""
    lines = [json.loads(line) for line in (run / "traffic.jsonl").read_text().splitlines()]
    return [sum(line.get(kind, 0) for kind in kinds) for line in lines if line["last"] is last]


def trained_bytes(run: Path) -> int:
    """Of all gradients of a rank."""
    return sum(4 * tensor.numel() for tensor in weights(run / "export").values())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_gradients_of_trained_weights_alone_cross_once_a_window(lab: Lab, engine: str) -> None:
    run = lab.run(engine, 2, 4, mutant="note_traffic")
    assert set(sent(run, last=False)) == {0}
    # Half of them are sent to the other rank, and half of the sum comes back or, divided, stays there.
    whole = trained_bytes(run) if engine == "ddp" else trained_bytes(run) // 2
    assert len(sent(run, last=True)) == STEPS
    assert sent(run, last=True) == pytest.approx([whole] * STEPS, rel=0.02)


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_engines_that_keep_gradients_divided_send_them_in_every_micro_batch(lab: Lab, engine: str) -> None:
    run = lab.run(engine, 2, 4, mutant="note_traffic")
    for each in (*sent(run, last=False), *sent(run, last=True)):
        assert 0 < each <= 1.1 * trained_bytes(run)


def test_only_engines_that_divide_weights_gather_them(lab: Lab) -> None:
    gathered: Counter[str] = Counter()
    for engine in ENGINES:
        gathered[engine] = sum(sent(lab.run(engine, 2, 4, mutant="note_traffic"), last=False, kinds=("allgather",)))
    assert gathered["ddp"] == gathered["zero2"] == 0
    assert min(gathered["zero3"], gathered["fsdp2"]) > 0


def test_the_bench_compares_processes_at_the_same_batch(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", Forked)
    recipe = make_recipe(lab.tables("bench", 1, 1, {}))
    found = compare_ranks(recipe, [LAUNCH / "ddp.yaml"], processes=2, steps=2, rounds=1)
    assert list(found) == ["one process", "ddp"]
    assert found["one process"]["bytes"] == 0
    trained = trained_bytes(lab.reference())
    assert trained < found["ddp"]["bytes"] < 1.05 * trained
    assert all(each["step_s"] > 0 for each in found.values())
