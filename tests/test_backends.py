"""The same update on any number of ranks, under every engine: real runs on two CPU processes, in one start of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backends.jobs import NUM_RECORDS, Lab, weights
from backends.mutants import MUTANTS
from runs import MEASURED, distance, metrics, predictions

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
TRAINED = ("lora", "projector", "full")
TOLERANCE = 1e-5
EVERY_3 = {"every": 3, "keep": 9}
NEXT = dict(zip(ENGINES, (*ENGINES[1:], ENGINES[0]), strict=True))
EVAL = {"at_start": True, "every": 5, "max_new_tokens": 3}


def model(lab: Lab, train: str, bits: int = 16) -> dict[str, object]:
    lora = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}} if train == "lora" else {}
    quantized = {"quantization": {"bits": bits}} if bits < 16 else {}
    return {"base": str(lab.folder / "base"), "template": "v1", "train": train, **lora, **quantized}


def evaluated(lab: Lab) -> dict[str, Any]:
    return {"data": {"eval": str(lab.folder / "data.json")}, "eval": EVAL}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("backends"))

    def one(name: str, profile: str = "cpu", **changes: Any) -> None:
        lab.add(name, profile, lab.tables(name, **changes))

    def two(name: str, profile: str, micro_batches: int, mutant: str | None = None, **changes: Any) -> None:
        lab.add(name, profile, lab.tables(name, 2, micro_batches, **changes), mutant)

    for train in TRAINED:
        one(f"reference-{train}", "cpu", model=model(lab, train), **(evaluated(lab) if train == "lora" else {}))
    one("reference-unclipped", optim={"max_grad_norm": 0.0})
    one("reference-qlora", model=model(lab, "lora", bits=4))
    one("reference-nonfinite", optim={"learning_rate": 1e30}, train={"on_nonfinite": "skip"})
    one("reference-8bit", model=model(lab, "lora", bits=8))
    for engine in ENGINES[1:]:
        one(f"{engine}-one-rank", engine, micro_batches=4)
    lab.run(1)

    for engine in ENGINES:
        for train in TRAINED:
            extra = {"checkpoint": EVERY_3, **evaluated(lab)} if train == "lora" else {}
            two(f"{engine}-{train}", engine, 4, model=model(lab, train), **extra)
        two(f"{engine}-unclipped", engine, 2, optim={"max_grad_norm": 0.0})
        two(f"{engine}-one-micro-batch", engine, 1)
        two(f"{engine}-qlora", engine, 2, model=model(lab, "lora", bits=4))
        two(f"{engine}-nonfinite", engine, 2, optim={"learning_rate": 1e30}, train={"on_nonfinite": "skip"})
    two("ddp-8bit", "ddp", 2, model=model(lab, "lora", bits=8))
    two("offload", "zero3_offload", 4)
    for engine in ENGINES:
        source = {"resume": str(lab.folder / "runs" / f"{engine}-lora" / "checkpoints" / "step-000003")}
        two(f"{engine}-resumed", engine, 4, run=source)
        two(f"{engine}-resumed-elsewhere", NEXT[engine], 4, run=source)
        two(f"{engine}-other-batch", engine, 2, run=source, train={"accumulation_steps": 1})
    for name in MUTANTS:
        two(name, "ddp", 2, mutant=name)
    lab.run(2)

    for engine in ENGINES:
        source = {"resume": str(lab.folder / "runs" / f"{engine}-lora" / "checkpoints" / "step-000003")}
        one(f"{engine}-resumed-on-one-rank", run=source)
        one(f"{engine}-adapter", model={"adapter": str(lab.folder / "runs" / f"{engine}-lora" / "export")})
    lab.run(1)
    return lab


def difference(lab: Lab, name: str, reference: str) -> float:
    return distance(weights(lab.output(name) / "export"), weights(lab.output(reference) / "export"))


def flat_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl with the evaluation's values among the others, less what a clock decides."""
    lines = [{**line, **line.get("eval", {})} for line in metrics(run)]
    return [{k: v for k, v in line.items() if k not in ("eval", *MEASURED)} for line in lines]


@pytest.mark.parametrize("train", TRAINED)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_with_short_windows_and_empty_micro_batches_end_as_one_rank_does(
    lab: Lab, engine: str, train: str
) -> None:
    assert difference(lab, f"{engine}-{train}", f"reference-{train}") < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_a_window_of_one_micro_batch_on_each_rank_ends_the_same(lab: Lab, engine: str) -> None:
    assert difference(lab, f"{engine}-one-micro-batch", "reference-lora") < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_an_engine_with_one_rank_ends_the_same(lab: Lab, engine: str) -> None:
    assert difference(lab, f"{engine}-one-rank", "reference-lora") < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_the_recipe_decides_about_clipping_under_every_engine(lab: Lab, engine: str) -> None:
    assert difference(lab, f"{engine}-unclipped", "reference-unclipped") < TOLERANCE
    # Else the runs above would have been clipped to no effect, and could not tell the two apart.
    assert difference(lab, "reference-unclipped", "reference-lora") > 100 * TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_qlora_trains_under_every_engine_as_on_one_rank(lab: Lab, engine: str) -> None:
    assert difference(lab, f"{engine}-qlora", "reference-qlora") < TOLERANCE


def test_eight_bits_train_under_ddp_as_on_one_rank(lab: Lab) -> None:
    assert difference(lab, "ddp-8bit", "reference-8bit") < TOLERANCE


def test_what_waits_in_main_memory_is_updated_just_the_same(lab: Lab) -> None:
    assert difference(lab, "offload", "reference-lora") < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_norms_and_evaluations_are_those_of_one_rank(lab: Lab, engine: str) -> None:
    ours, reference = (flat_metrics(lab.output(name)) for name in (f"{engine}-lora", "reference-lora"))
    assert len(ours) == len(reference) == 7
    for line, expected in zip(ours, reference, strict=True):
        assert line == pytest.approx(expected, rel=TOLERANCE)
    found, losses = predictions(lab.output(f"{engine}-lora") / "predictions/step-000005.jsonl")
    expected, expected_losses = predictions(lab.output("reference-lora") / "predictions/step-000005.jsonl")
    assert found == expected and len({row["id"] for row in found}) == len(found) == NUM_RECORDS
    assert losses == pytest.approx(expected_losses, rel=TOLERANCE, abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_without_a_finite_norm_makes_no_update(lab: Lab, engine: str) -> None:
    lines = [
        json.loads(line) for line in (lab.output(f"{engine}-nonfinite") / "nonfinite.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [3, 4, 5]
    ours, reference = (weights(lab.output(name) / "export") for name in (f"{engine}-nonfinite", "reference-nonfinite"))
    for name, tensor in reference.items():
        # Their squares have no place in fp32, so no norm is taken of these.
        assert torch.isfinite(tensor).all()
        torch.testing.assert_close(ours[name], tensor, rtol=TOLERANCE, atol=0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_ends_with_the_very_same_weights(lab: Lab, engine: str) -> None:
    whole, resumed = (weights(lab.output(name) / "export") for name in (f"{engine}-lora", f"{engine}-resumed"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_resumed_by_another_engine_and_by_another_number_of_ranks(lab: Lab, engine: str) -> None:
    assert difference(lab, f"{engine}-resumed-elsewhere", "reference-lora") < TOLERANCE
    assert difference(lab, f"{engine}-resumed-on-one-rank", "reference-lora") < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_is_refused_where_a_step_is_another_portion_of_data(lab: Lab, engine: str) -> None:
    assert "counts steps of 8 examples" in lab.error(f"{engine}-other-batch")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_of_any_engine_starts_a_run_of_one_process(lab: Lab, engine: str) -> None:
    lab.output(f"{engine}-adapter")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_exactness_fails_with(lab: Lab, mutant: str) -> None:
    assert difference(lab, mutant, "reference-lora") > 100 * TOLERANCE
