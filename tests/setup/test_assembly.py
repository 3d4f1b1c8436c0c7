"""What stays in memory between steps: each weight once, in its own type, and the optimizer's state."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.runs import recipe
from llava_accel.console.output import Console
from llava_accel.estimate.peak_memory import Layout as Profile
from llava_accel.estimate.peak_memory import count_weights, plan_for
from llava_accel.estimate.trace import build_meta
from llava_accel.kernels.compiled import MOST_KINDS
from llava_accel.loop.optimizer import build_optimizer
from llava_accel.measurement.probe import living_bytes
from llava_accel.model import build
from llava_accel.model.processing import load_processing
from llava_accel.recipe import OptimTable
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.assembly import build_objective

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"adapter": "", "quantization": {"bits": 4}},
    "full": {"adapter": "", "train": "full"},
}


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_is_there_once_and_frozen_ones_in_the_type_of_storage_alone(
    tmp_path: Path, model: dict[str, Any], precision: str
) -> None:
    settings = recipe(tmp_path, run={"precision": precision}, model=model)
    stored = torch.bfloat16 if precision == "bf16" else torch.float32
    accelerator, processing = build_accelerator(settings), load_processing(settings.model, "pad")
    before = living_bytes(CPU)
    objective, loaded = build_objective(RunContext(settings, accelerator, Console(False)), processing)
    if objective.parked:
        objective.parked.on(CPU)  # as the first image without stored features does
    kept = living_bytes(CPU) - before
    assert {weight.dtype for weight in loaded.model.parameters() if not weight.requires_grad} == {stored}
    assert {weight.dtype for weight in loaded.model.parameters() if weight.requires_grad} == {torch.float32}
    planned = plan_for(
        Profile("one GPU"), count_weights(build_meta(settings, processing, stored), settings), settings, ()
    )
    buffers = sum(buffer.nbytes for module in (objective, objective.tower) for buffer in module.buffers())
    # Each quantised layer has a table of 1 KiB besides, which is much beside layers as small as these.
    assert kept == pytest.approx(planned.weights + planned.quantised + buffers, rel=0.04)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_with_flex_attention_keeps_it_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "attention", lambda _: {"text_config": "flex_attention", "vision_config": "sdpa"})
    monkeypatch.setattr(torch.compiler.config, "recompile_limit", 8)
    for kernel, expected in (("auto", 8), ("flex_attention", MOST_KINDS)):
        settings = recipe(tmp_path, model={"attention": kernel})
        run = RunContext(settings, build_accelerator(settings), Console(False))
        build_objective(run, load_processing(settings.model, "pad"))
        assert torch.compiler.config.recompile_limit == expected


@pytest.mark.parametrize("size", [4095, 4096, 100_000])
def test_8_bit_moments_are_bytes_with_a_scale_for_256_and_small_tensors_keep_fp32(size: int) -> None:
    model = nn.Linear(size, 1, bias=False)
    optimizer = build_optimizer(model, OptimTable().model_copy(update={"optimizer": "adamw_8bit"}))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    state = optimizer.state[model.weight]
    # The table that gives a byte its meaning is one for all tensors.
    found = Counter(
        {name: value.nbytes for name, value in state.items() if torch.is_tensor(value) and "qmap" not in name}
    )
    if size < 4096:
        assert found == {"state1": 4 * size, "state2": 4 * size}
    else:
        scales = 4 * -(-size // 256)
        assert found == {"state1": size, "state2": size, "absmax1": scales, "absmax2": scales}
    assert {type(value) for value in optimizer.state} == {nn.Parameter} and len(optimizer.state) == 1
