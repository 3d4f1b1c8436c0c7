"""What is planned is what a run takes, without a weight being loaded."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensor

import llava_accel.train as verb
from gpu.seven_billion import make_base, make_data
from helpers.kinds import ALL_KINDS
from helpers.runs import PARITY, mixed_records, recipe, talk, write_records
from helpers.tiled import KIT
from helpers.traces import planned_alone
from helpers.verbs import start
from llava_accel import plan as plan_file
from llava_accel.console.output import Console
from llava_accel.estimate.peak_memory import CONTEXT_BYTES, GIB, USABLE, Layout, Plan, count_weights
from llava_accel.estimate.trace import Moment, build_meta, trace_step
from llava_accel.estimate.worst_case import worst_batch
from llava_accel.model import objective as objective_file
from llava_accel.model.objective import Objective
from llava_accel.model.processing import load_processing
from llava_accel.plan import plan, verdict
from llava_accel.recipe import Recipe
from llava_accel.runtime import devices
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import open_data

pytestmark = pytest.mark.slow

FULL = {"train": "full", "adapter": ""}
QLORA = {"quantization": {"bits": 4}, "adapter": "", "lora": {"dropout": 0.1}}
TWICE = {"per_device_batch_size": 8, "accumulation_steps": 2}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {},
    "lora, all layers again": {"model": {"gradient_checkpointing": True}},
    "lora, every second layer again": {"model": {"gradient_checkpointing": 2}},
    "lora, accumulated": {"train": TWICE},
    "lora, bf16": {"run": {"precision": "bf16"}},
    "lora, questions share images": {"data": {"share_prefix": True}},
    "qlora": {"model": QLORA},
    "qlora, every second layer again, accumulated": {"model": QLORA | {"gradient_checkpointing": 2}, "train": TWICE},
    "projector": {"model": {"train": "projector", "adapter": ""}},
    "full": {"model": FULL},
    "full, accumulated": {"model": FULL, "train": TWICE},
    "full, bf16": {"model": FULL, "run": {"precision": "bf16"}},
    "full, 8-bit moments": {"model": FULL, "optim": {"optimizer": "adamw_8bit"}},
    "full, tower trained": {"model": FULL | {"train_vision": True}},
    "full, tower trained, all again, accumulated": {
        "model": FULL | {"train_vision": True, "gradient_checkpointing": True},
        "train": TWICE,
    },
}

SOME = (
    "lora, every second layer again", "lora, bf16", "lora, questions share images",
    "qlora, every second layer again, accumulated", "projector", "full, bf16", "full, 8-bit moments",
    "full, tower trained, all again, accumulated",
)  # fmt: skip
"""What the others are made of; LLAVA_ACCEL_ALL_KINDS=1 takes all."""


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("name", CASES if ALL_KINDS else SOME)
def test_the_plan_is_within_5_percent_of_what_a_step_takes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = plan_file.measure_step

    def noting(*values: Any) -> int:
        measured.append(measure(*values))
        return measured[-1]

    monkeypatch.setattr(plan_file, "measure_step", noting)
    data = write_records(tmp_path / "data.json", mixed_records(24))
    found = plan(recipe(tmp_path, data, **CASES[name]), 24.0, 4, probe=True)
    assert found[0].total == pytest.approx(measured[0], rel=0.05)


def test_nothing_is_loaded_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "measure_step", None)
    for found in plan(recipe(tmp_path), None, 8, probe=False):
        assert found.total > 0


def test_a_plan_says_that_it_does_not_know_compiled_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(recipe(tmp_path, model={"compile": True}), None, 8, probe=False)
    assert "layers that are not compiled" in " ".join(capsys.readouterr().out.split())
    plan(recipe(tmp_path, model={"kernels": "liger"}), None, 8, probe=False)
    assert '"native", which keeps fewer' in " ".join(capsys.readouterr().out.split())


def test_a_plan_says_what_bf16_means_on_this_cpu_and_not_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices, "bf16_on_cpu", lambda: True)
    for gpu_gb, is_said in ((None, True), (24.0, False)):
        plan(recipe(tmp_path), gpu_gb, 1, probe=False)
        assert ('with run.precision = "bf16"' in " ".join(capsys.readouterr().out.split())) == is_said


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Config, tokenizer and image processor of LLaVA-1.5-7B's shapes, no weights; and records with an image."""
    folder = tmp_path_factory.mktemp("seven_billion")
    return make_base(folder / "base", tiny=False, weights=False), make_data(folder / "data", 40, 1, 336)


def _big(base: Path, data: Path, folder: Path, batch: int, **model: Any) -> Recipe:
    changes = {"base": str(base), "vision_tower": "", "adapter": "", **model, "lora": {"rank": 128, "alpha": 256}}
    return recipe(folder, data, model=changes, data={"images": ""}, train={"per_device_batch_size": batch})


FITTING: dict[str, tuple[dict[str, Any], float]] = {
    "checkpointed": ({"quantization": {"bits": 4}, "gradient_checkpointing": True}, 8.0),
    "not": ({"quantization": {"bits": 4}}, 12.0),
}


@pytest.mark.parametrize("name", FITTING if ALL_KINDS else ("checkpointed",))
def test_the_largest_batch_of_a_large_model_is_the_largest_that_fits(
    seven_billion: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """Of 7B's shapes, and a quarter of its layers: three plans of it are quicker."""
    model, gigabytes = FITTING[name]
    base = Path(shutil.copytree(seven_billion[0], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["num_hidden_layers"], config["vision_config"]["num_hidden_layers"] = 8, 6
    (base / "config.json").write_text(json.dumps(config))
    table = _big(base, seven_billion[1], tmp_path, 2, **model)
    found = planned_alone(table)
    largest = found.largest_batch(gigabytes * 1e9, 2)
    assert largest > 2
    assert verdict(found, gigabytes, table) == f"one GPU: fits {gigabytes:g} GB with batch 2; largest batch {largest}"
    for batch, expected in ((largest, True), (largest + 1, False)):
        again = planned_alone(_big(base, seven_billion[1], tmp_path, batch, **model))
        assert (again.total + CONTEXT_BYTES <= USABLE * gigabytes * 1e9) == expected, batch


def test_a_7b_model_in_full_fits_no_gpu(seven_billion: tuple[Path, Path], tmp_path: Path) -> None:
    table = _big(*seven_billion, tmp_path, 1, train="full")
    found = planned_alone(table)
    assert found.total > 16 * 6.7e9, "weights, gradients and two moments, in fp32"
    assert verdict(found, 80.0, table).endswith(
        'no batch fits: set model.gradient_checkpointing = true or optim.optimizer = "adamw_8bit", or use more GPUs'
    )


def test_a_7b_model_has_the_weights_that_are_known_of_it(seven_billion: tuple[Path, Path], tmp_path: Path) -> None:
    """LLaVA-1.5-7B: 6.74 billion of Vicuna, 304 million of CLIP-L/336, 21 million of the projector."""
    table = _big(*seven_billion, tmp_path, 2, quantization={"bits": 4})
    processing = load_processing(table.model, "pad")
    found = count_weights(build_meta(table, processing, torch.bfloat16), table)
    lora = 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert found.trained == lora + 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert found.quantised == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.quantised_bytes == pytest.approx(found.quantised * 0.516, rel=0.001)
    assert found.total - lora == pytest.approx(7.06e9, rel=0.01)


def _plan(fixed_gb: float, row_gb: float, batch: int = 4) -> Plan:
    return Plan(Layout("one GPU"), round(fixed_gb * GIB), 0, 0, 0, 0, (Moment(int(batch * row_gb * GIB)),))


def test_a_verdict_names_the_largest_batch_that_fits(tmp_path: Path) -> None:
    table = recipe(tmp_path, train={"per_device_batch_size": 4})
    assert verdict(_plan(10, 1), 24.0, table) == "one GPU: fits 24 GB with batch 4; largest batch 10"
    assert "does not fit 24 GB with batch 4; train.per_device_batch_size = 2 fits" in verdict(_plan(10, 4), 24.0, table)
    assert "no batch fits: set model.gradient_checkpointing" in verdict(_plan(30, 1), 24.0, table)


def test_out_of_memory_names_batch_plan_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Objective.forward

    def full(self: Objective, **batch: Any) -> torch.Tensor:
        if isinstance(batch["input_ids"], FakeTensor):  # the plan's own pass takes no memory
            return forward(self, **batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Objective, "forward", full)
    data = write_records(tmp_path / "data.json", mixed_records(3))
    with pytest.raises(
        ValueError, match=r"out of memory.*r\d, r\d, r\d\. Planned: .*Set model\.gradient_checkpointing"
    ):
        verb.train(recipe(tmp_path, data))


def test_the_more_layers_are_computed_again_the_less_is_kept(tmp_path: Path, llava_folder: Path) -> None:
    base = Path(shutil.copytree(llava_folder, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 7
    (base / "config.json").write_text(json.dumps(config))
    data, found = write_records(tmp_path / "data.json", mixed_records(8)), []
    for every in (False, 2, True):
        model = {"base": str(base), "vision_tower": "", "adapter": "", "gradient_checkpointing": every}
        table = recipe(tmp_path, data, model=model)
        processing = load_processing(table.model, "pad")
        training, _ = open_data(RunContext(table, Accelerator(cpu=True), Console(False)), processing)
        moments = trace_step(table, processing, worst_batch(table, training), torch.float32, False)
        found.append(max(moment.by_rows for moment in moments))
    assert found[0] > 1.4 * found[1] > 1.4**2 * found[2]


def test_logits_in_parts_take_the_memory_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = recipe(tmp_path, write_records(tmp_path / "data.json", mixed_records(8)))
    processing = load_processing(table.model, "pad")
    training, _ = open_data(RunContext(table, Accelerator(cpu=True), Console(False)), processing)
    batch = worst_batch(table, training)
    targets = batch["target_ids"]
    assert isinstance(targets, torch.Tensor)
    row, found = 4 * processing.vocab_size, []
    for rows in (len(targets), 4):
        monkeypatch.setattr(objective_file, "LOGITS_AT_ONCE", rows * processing.vocab_size)
        found.append(trace_step(table, processing, batch, torch.float32, False))
    whole, parts = (max(moment.logits for moment in moments) for moments in found)
    assert 3 * row * len(targets) <= whole <= 4 * row * len(targets)
    assert parts <= 4 * row * 4 and len(targets) > 16
    whole, parts = (max(moment.by_rows for moment in moments) for moments in found)
    assert parts < whole - row * len(targets)


RECIPES = PARITY.parents[1] / "recipes"
TILED = sorted([*RECIPES.glob("next_*.toml"), *RECIPES.glob("onevision_*.toml")])
# Each way to train on one of the two families; with LLAVA_ACCEL_ALL_KINDS=1 every recipe.
SOME_TILED = [path for path in TILED if path.stem in ("next_qlora_24gb", "onevision_full", "onevision_lora")]


@pytest.mark.parametrize("path", TILED if ALL_KINDS else SOME_TILED, ids=lambda path: path.stem)
def test_each_recipe_of_a_tiled_base_is_planned_with_a_small_one(path: Path, tmp_path: Path) -> None:
    images = PARITY / "next" / "images"
    records = [talk(n, "What?", "Red", image.name) for n, image in enumerate(sorted(images.glob("*.png")))]
    data = {"train": write_records(tmp_path / "data.json", records), "images": images}
    data |= {"eval_fraction": 0.5, "cache_dir": tmp_path}
    base = KIT / ("next-vicuna" if path.stem.startswith("next_") else "onevision-qwen")
    ended = start("plan", str(path), f"model.base={base}", *(f"data.{key}={value}" for key, value in data.items()))
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert re.search(r"with up to \d+ at once", said) and "checkpoint.verify: when the run has ended" in said
    assert re.search(r"rows of \d+ tokens, \d+ tiles", said)
    assert "evaluation: questions that are answered" in said
