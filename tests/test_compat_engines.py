"""accelerate, DeepSpeed, bitsandbytes and the hub's client keep what `compat.py` reads in them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from contracts import contract
from llava_accel import compat


def make_linear_4bit() -> nn.Module:
    """A layer of 64 x 64 weights in NF4, packed and in evaluation mode."""
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportPrivateImportUsage]

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu").eval()


# accelerate


@contract(compat.pretend_gpus)
def test_accelerate_takes_cpu_processes_for_fsdp(
    one_rank: None, fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    compat.pretend_gpus()
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    assert accelerator.distributed_type == DistributedType.FSDP and accelerator.device.type == "cpu"


@contract(compat.tracker_classes)
def test_only_trackers_that_are_installed_are_told(tmp_path: Path, fresh_accelerator: None) -> None:
    from accelerate import Accelerator
    from accelerate.tracking import TensorBoardTracker

    accelerator = Accelerator(log_with=["tensorboard", "comet_ml"], project_dir=tmp_path)
    assert compat.tracker_classes(accelerator) == {"tensorboard": TensorBoardTracker}


# DeepSpeed, in a process of its own: it looks for its device once. On two ranks: test_backends.py under zero2 and zero3,
# and test_backends_resume.py, which puts moments back.


_ONE_STEP = """
import json, torch, torch.distributed
from torch import nn
import deepspeed
from deepspeed.comm.torch import build_shm_op
from deepspeed.utils import safe_get_full_optimizer_state
from llava_accel import compat

compat.leave_out_shared_memory()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)

def one_step(stage):
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
              "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 1, bias=False))
    if stage == 3:
        init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=torch.float32)
        for parameter in model.parameters():
            compat.partition(parameter, init)
    first, second = model.parameters()
    left = [parameter.numel() for parameter in (first, second)]  # a step leaves weights as small as these whole
    groups = [{"params": [first]}, {"params": [second]}]
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
    linked = [compat.link_moments(optimizer)(parameter) for parameter in (first, second)] if stage == 2 else []
    flat = compat.flat_partitions(optimizer)
    moments = [safe_get_full_optimizer_state(parameter, "exp_avg") for parameter in (first, second)]
    return {
        "shm": build_shm_op() is None,
        "left": left,
        "parts": [part and [list(part[0]), part[1].numel()] for part in map(compat.partition_of, (first, second))],
        "fragments": [[start, found["exp_avg"].numel()] for start, found in linked],
        "flat": [tensor.numel() for tensor in flat],
        "keys": sorted(optimizer.optimizer.state[flat[0]]),
        "moments": [moment is not None and list(moment.shape) for moment in moments],
    }

print(json.dumps({stage: one_step(stage) for stage in (2, 3)}))
"""


@pytest.fixture(scope="module")
def zero() -> dict[str, dict[str, Any]]:
    """What a step of ZeRO on one rank tells, by the stage."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", _ONE_STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@contract(compat.leave_out_shared_memory)
def test_deepspeed_compiles_no_collectives(zero: dict[str, dict[str, Any]]) -> None:
    assert zero["2"]["shm"]


@pytest.mark.slow
@contract(compat.partition)
def test_a_weight_alone_is_partitioned(zero: dict[str, dict[str, Any]]) -> None:
    assert zero["3"]["left"] == [0, 0] and zero["2"]["left"] == [15, 5]


@pytest.mark.slow
@contract(compat.partition_of)
def test_a_partitioned_weight_tells_its_shape_and_its_part(zero: dict[str, dict[str, Any]]) -> None:
    assert zero["3"]["parts"] == [[[5, 3], 15], [[1, 5], 5]] and zero["2"]["parts"] == [None, None]


@pytest.mark.slow
@contract(compat.flat_partitions)
@pytest.mark.parametrize("stage", [2, 3])
def test_the_optimizer_updates_one_flat_tensor_for_each_group(zero: dict[str, dict[str, Any]], stage: int) -> None:
    found = zero[str(stage)]
    assert len(found["flat"]) == 2 and found["flat"][0] >= 15 and found["flat"][1] >= 5
    assert found["keys"] == ["exp_avg", "exp_avg_sq", "step"]


@pytest.mark.slow
@contract(compat.link_moments)
def test_zero_2_finds_the_moments_of_all_groups(zero: dict[str, dict[str, Any]]) -> None:
    assert zero["2"]["moments"] == [[5, 3], [1, 5]]
    assert zero["2"]["fragments"] == [[0, 15], [0, 5]]


# bitsandbytes and the hub


@contract(compat.keep_storage_format)
def test_4_bit_weights_are_not_repacked_on_a_cpu() -> None:
    for is_kept in (False, True):
        layer = make_linear_4bit()
        layer.support_avx512bf16_for_cpu = True  # pyright: ignore  what it finds on a CPU with bf16
        if is_kept:
            compat.keep_storage_format(nn.Sequential(layer))
        before = layer.weight.detach().clone()  # pyright: ignore
        with torch.no_grad():
            layer(torch.ones(1, 64))
        assert (before.shape == layer.weight.shape and torch.equal(before, layer.weight)) == is_kept  # pyright: ignore


@contract(compat.packed_weights)
def test_a_4_bit_parameter_tells_what_it_stands_for() -> None:
    weight = make_linear_4bit().weight
    assert compat.packed_weights(weight) == ("nf4", 64 * 64) and weight.numel() < 64 * 64  # pyright: ignore
    assert compat.packed_weights(nn.Parameter(torch.ones(2))) is None


@contract(compat.hub_http_error)
def test_the_errors_of_the_hubs_client_have_a_common_kind() -> None:
    from huggingface_hub.errors import HfHubHTTPError

    assert issubclass(HfHubHTTPError, compat.hub_http_error())
