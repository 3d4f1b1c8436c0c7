"""Under every engine on two ranks: quantised bases, offloading, cached features, and data that ranks could hang on.

Where engines differ in nothing but whether they divide the weights, the suite takes one or two of them, and with
LLAVA_ACCEL_ALL_KINDS=1 all.
"""

import copy
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers import curves
from helpers.fp64 import IN_FP64
from helpers.jobs import ENGINES, STEPS, TOLERANCE, Lab, assert_same_metrics, difference, trains, weights
from helpers.kinds import ALL_KINDS
from helpers.runs import PARITY, distance, losses, metrics, mixed_records, pairs, write_records

pytestmark = pytest.mark.slow


def bits(number: int, **more: Any) -> dict[str, Any]:
    """A recipe with a quantised base."""
    return trains("lora", quantization={"bits": number, **more})


@pytest.mark.parametrize("engine", ENGINES)
def test_qlora_nf4_trains_under_every_engine_as_on_one_process(lab: Lab, engine: str) -> None:
    run, reference = lab.run(engine, 2, 2, **bits(4)), lab.reference(**bits(4))
    assert difference(run, reference) < TOLERANCE
    assert_same_metrics(run, reference)
    assert difference(reference, lab.reference(**trains("lora"))) > 100 * TOLERANCE, "the base was not quantised"


def test_eight_bits_train_under_ddp_as_on_one_process(lab: Lab) -> None:
    assert difference(lab.run("ddp", 2, 2, **bits(8)), lab.reference(**bits(8))) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_eight_bits_are_refused_before_loading_with_the_nearest_thing_that_works(lab: Lab, engine: str) -> None:
    missing = bits(8)
    missing["model"]["base"] = str(lab.folder / "nowhere")
    for error in lab.errors(engine, 2, 2, **missing):
        assert "model.quantization.bits = 8 does not work with" in error
        assert "Set 4, or launch with launch/ddp.yaml" in error


def test_what_waits_in_main_memory_is_updated_just_the_same(lab: Lab) -> None:
    assert difference(lab.run("zero3_offload", 2, 2), lab.reference(**trains("lora"))) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES if ALL_KINDS else ("ddp", "zero3"))
def test_features_are_computed_once_and_taken_from_the_cache_under_every_engine(lab: Lab, engine: str) -> None:
    cache = lab.folder / f"cache-{engine}"
    cached: dict[str, Any] = {"data": {"cache_features": True, "cache_dir": str(cache)}}
    for name in ("-cold", "-warm"):
        run = lab.run(engine, 2, 2, name=name, **cached)
        assert difference(run, lab.reference(**trains("lora"))) < TOLERANCE
        assert list((cache / "features").rglob("*.safetensors"))


@pytest.mark.parametrize("engine", ENGINES if ALL_KINDS else ("zero2", "fsdp2"))
def test_each_rank_reads_the_tower_for_its_own_images_without_cached_features(lab: Lab, engine: str) -> None:
    cache = lab.folder / f"cache-few-{engine}"
    few: dict[str, Any] = {
        "data": {"cache_features": True, "cache_dir": str(cache), "cache_max_gb": 10e-6}
    }  # two records
    for name in ("-cold", "-warm"):
        assert difference(lab.run(engine, 2, 2, name=name, **few), lab.reference(**trains("lora"))) < TOLERANCE
    assert len(list((cache / "towers").iterdir())) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trained_tower_and_checkpointed_layers_are_the_same_under_every_engine(lab: Lab, engine: str) -> None:
    settings = trains("lora", train_vision=True, gradient_checkpointing=True)
    settings["optim"] = {"vision_learning_rate": 1e-3}
    assert difference(lab.run(engine, 2, 2, **settings), lab.reference(**settings)) < TOLERANCE


SOME_TILES = [
    ("ddp", "next_lora_accum"), ("zero2", "onevision_full"), ("zero3", "next_full"), ("fsdp2", "next_lora_accum"),
]  # fmt: skip
ALL_TILES = list(product(ENGINES, curves.RUNS))


@pytest.mark.parametrize(("engine", "name"), ALL_TILES if ALL_KINDS else SOME_TILES)
@pytest.mark.parametrize("precision", ["", "in_fp64"])
def test_tiles_train_as_in_the_originals_own_code_under_every_engine(
    lab: Lab, engine: str, name: str, precision: str
) -> None:
    curve: dict[str, Any] = curves.settings(name)
    split = ("per_device_batch_size", "accumulation_steps")
    curve["train"] = {key: value for key, value in curve["train"].items() if key not in split} | {"max_steps": 20}
    curve["data"] |= {"train": str(curves.records(name))}
    curve["data"] |= IN_FP64 if precision else {}
    run = lab.run(engine, 2, 2 if name.endswith("accum") else 1, mutant=precision, **curve)
    assert losses(run) == pytest.approx([step["loss"] for step in curves.reference(name)], abs=curves.LOSS_TOLERANCE)
    curves.assert_final_weights(run, name, 0.0 if precision else curves.STRAYS)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_layers_train_as_others_and_resume_bit_for_bit(lab: Lab) -> None:
    """Every batch has several rows of one branch, so each process makes one graph, and ranks find it on disk."""
    settings = trains("lora")
    settings["data"] = {"train": str(write_records(lab.folder / "sixteen.json", mixed_records(16)))}
    settings["train"] = {"max_steps": 4}
    settings["checkpoint"] = {"every": 2, "keep": 9}
    compiled = copy.deepcopy(settings)
    compiled["model"]["compile"] = True
    reference = lab.reference(**settings)
    for engine, ranks in [("cpu", 1), ("ddp", 2), *([("zero2", 2)] if ALL_KINDS else [])]:
        run = lab.run(engine, ranks, **compiled)
        assert 0 < difference(run, reference) < TOLERANCE
        if engine == "ddp" and not ALL_KINDS:
            continue
        compiled["run"] = {"resume": str(run / "checkpoints" / "step-000002")}
        resumed = lab.run(engine, ranks, name="-resumed", **compiled)
        assert difference(resumed, run) == 0.0 and len(losses(resumed)) == 2
        del compiled["run"]


@pytest.mark.parametrize(("engine", "train"), zip(ENGINES, ("lora", "full", "full", "lora"), strict=True))
def test_pairs_are_preferred_under_every_engine_as_on_one_process(lab: Lab, engine: str, train: str) -> None:
    data = write_records(lab.folder / "pairs.json", pairs(13))
    settings = trains(train)
    settings["data"] = {**settings.get("data", {}), "train": str(data), "eval_fraction": 0.3, "share_prefix": True}
    settings["train"] = {**settings.get("train", {}), "objective": "dpo"}
    settings["preference"] = {"sft_weight": 0.5}
    settings["optim"] = {**settings.get("optim", {}), "optimizer": "sgd", "learning_rate": 0.2}
    run, reference = lab.run(engine, 2, 2, **settings), lab.reference(**settings)
    assert difference(run, reference) < TOLERANCE
    for ours, theirs in zip(metrics(run), metrics(reference), strict=True):
        ours, theirs = ours.get("eval", ours), theirs.get("eval", theirs)
        for name in ("loss", "reward_margin", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_data_without_a_image_trains_on_two_ranks(lab: Lab, engine: str) -> None:
    settings: dict[str, Any] = {"data": {"train": str(lab.folder / "text.json")}}
    assert difference(lab.run(engine, 2, 2, **settings), lab.reference(**settings)) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES if ALL_KINDS else ("zero2", "fsdp2"))
def test_fewer_records_than_ranks_and_micro_batches_train(lab: Lab, engine: str) -> None:
    few = write_records(lab.folder / "few.json", mixed_records(1))
    settings: dict[str, Any] = {"data": {"train": str(few)}}
    run = lab.run(engine, 2, 4, **settings)
    assert [line["num_examples"] for line in metrics(run)] == [1] * STEPS
    assert difference(run, lab.reference(**settings)) < TOLERANCE


@pytest.fixture(scope="module")
def broken(lab: Lab) -> dict[str, Any]:
    """Data that was read through, and then one of its images broke."""
    shutil.copytree(PARITY / "images", lab.folder / "images")
    settings: dict[str, Any] = {"data": {"images": str(lab.folder / "images"), "on_bad_record": "skip"}}
    lab.reference(train={"max_steps": 1}, **settings)
    image = lab.folder / "images" / "t1.png"
    Image.open(image).save(image, format="PNG")
    image.write_bytes(image.read_bytes()[:-40])
    return settings


@pytest.mark.parametrize("engine", ENGINES if ALL_KINDS else ("ddp", "fsdp2"))
def test_a_image_that_breaks_is_left_out_on_its_rank_and_all_go_on(
    lab: Lab, broken: dict[str, Any], engine: str
) -> None:
    run, reference = lab.run(engine, 2, 4, **broken), lab.reference(**broken)
    assert difference(run, reference) < TOLERANCE
    skipped, expected = ({*(path / "skipped.txt").read_text().splitlines()} for path in (run, reference))
    assert skipped == expected and all("t1.png" in line for line in skipped)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_without_a_finite_norm_makes_no_update(lab: Lab, engine: str) -> None:
    settings = {"optim": {"learning_rate": 1e30}, "train": {"on_nonfinite": "skip", "max_steps": 4}}
    run, reference = lab.run(engine, 2, 2, **settings), lab.reference(**settings)
    lines = [json.loads(line) for line in (run / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    ours, theirs = (weights(path / "export") for path in (run, reference))
    assert all(bool(tensor.isfinite().all()) for tensor in ours.values())
    assert distance(_smaller(ours), _smaller(theirs)) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_fp16_that_overflows_is_computed_again_under_every_engine(lab: Lab, engine: str) -> None:
    in_fp16: dict[str, Any] = {"run": {"precision": "fp16"}}
    run = lab.run(engine, 2, 2, mutant="loss_scale_too_high", **in_fp16)
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[0]["num_overflows"] >= 2
    assert all(line["loss_scale"] == 2.0 ** (20 - line["num_overflows"]) for line in lines)
    assert not (run / "nonfinite.jsonl").exists()
    exact = lab.reference(**trains("lora"))
    assert losses(run) == pytest.approx(losses(exact), rel=2e-3)
    assert [line["grad_norm"] for line in lines] == pytest.approx([o["grad_norm"] for o in metrics(exact)], rel=2e-2)
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in metrics(exact)]
    assert 1e-6 < difference(run, exact) < 2e-2


def _smaller(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In fp64: the squares of weights of this size have no place in fp32."""
    return {name: tensor.double() for name, tensor in tensors.items()}


def test_the_folder_of_a_run_has_one_writer(lab: Lab) -> None:
    run: Path = lab.run("zero3", 2, 4, **trains("lora"))
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    steps = [line["step"] for line in metrics(run)]
    assert steps == sorted(set(steps)), "no step was written twice"
