"""What each figure measures. Whatever cannot be measured is a row that says why; no figure is filled in otherwise."""

import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from accelerate.state import AcceleratorState
from torch.utils.benchmark import Timer

from bench.memory import Peak
from gpu.seven_billion import make_base, make_data, make_next
from helpers.runs import metrics, tables
from llava_accel import plan as plan_file
from llava_accel.bench import bench
from llava_accel.exceptions import UserError
from llava_accel.model import objective as objective_file
from llava_accel.model.build import load_model
from llava_accel.model.processing import load_processing
from llava_accel.plan import plan
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.runtime.timing import matrix_rate, wait_for
from llava_accel.train import train

GIB = 2**30
NOMINAL = {
    "H100 80GB HBM3": (989e12, 3.35e12), "H100 PCIe": (756e12, 2.0e12), "H200": (989e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 2.04e12), "A100-SXM4-40GB": (312e12, 1.56e12), "A100 80GB PCIe": (312e12, 1.94e12),
    "L40S": (362e12, 0.86e12), "RTX 4090": (165e12, 1.01e12),
}  # fmt: skip
"""By a part of the card's name: what its maker says of dense products in bf16, and bytes a second of its memory."""
_WRONG = (UserError, RuntimeError, ValueError, TypeError, ImportError)
"""How a switch fails that this machine, or this version, cannot do."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how large."""

    folder: Path
    is_tiny: bool
    rounds: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Measured:
    """A value, or in `note` why there is none."""

    title: str
    value: float | None = None
    unit: str = ""
    target: float | None = None
    is_limit: bool = False
    """Whether the target is the most that it may be, and not the least."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    measure: Callable[[Setting], Iterator[Measured]]


def ceilings(setting: Setting) -> Iterator[Measured]:
    """What the card does at best: large products in bf16, and copies."""
    rate = matrix_rate(setting.device, torch.float32 if setting.is_tiny else torch.bfloat16)
    yield Measured("matrix products", rate / 1e12, "TFLOP/s")
    source = torch.empty((2**24 if setting.is_tiny else 2**30), dtype=torch.uint8, device=setting.device)
    into = torch.empty_like(source)
    found = Timer("into.copy_(source)", globals={"into": into, "source": source})
    speed = 2 * source.nbytes / min(found.blocked_autorange(min_run_time=0.5).times)
    yield Measured("memory, read and written", speed / 1e12, "TB/s")
    nominal = nominal_rate()
    if nominal is None:
        yield Measured("products over the card's nominal rate", note="what its maker says is not in NOMINAL")
        return
    yield Measured("products over the card's nominal rate", 100 * rate / nominal[0], "%")
    yield Measured("memory over the card's nominal rate", 100 * speed / nominal[1], "%")


def nominal_rate() -> tuple[float, float] | None:
    """Of this machine's card, if it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rates for part, rates in NOMINAL.items() if part in name), None)


SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, float]] = {
    "LoRA": ({}, None, 1e-4),
    "DoRA": ({"model": {"adapter": "", "lora": {"variant": "dora"}}}, None, 1e-4),
    "projector": ({"model": {"train": "projector", "adapter": ""}}, None, 1e-4),
    "in full, with the tower": ({"model": {"train": "full", "adapter": "", "train_vision": True}}, None, 1e-4),
    "layers again": ({"model": {"gradient_checkpointing": True}}, None, 1e-4),
    "shared prefixes": ({"data": {"share_prefix": True}}, None, 1e-4),
    "tower not cached": ({"data": {"cache_features": False}}, None, 1e-4),
    "eager attention": ({"model": {"attention": "eager"}}, None, 1e-4),
    "flex attention": ({"model": {"attention": "flex_attention"}}, {}, 1e-4),
    "model.compile": ({"model": {"compile": True}}, {}, 1e-4),
    "run.deterministic": ({"run": {"deterministic": True}}, {}, 1e-4),
    "4 bits": ({"model": {"quantization": {"bits": 4}, "adapter": ""}}, None, 2e-3),
    "8 bits": ({"model": {"quantization": {"bits": 8}, "adapter": ""}}, None, 5e-2),
    "bf16": ({"run": {"precision": "bf16"}}, {}, 5e-2),
    "fp16": ({"run": {"precision": "fp16"}}, {}, 5e-2),
    "liger's kernels": ({"model": {"kernels": "liger"}}, {}, 1e-4),
}
"""What the device computes with, what the CPU's losses are computed with if with something else (in fp32), and how far
apart the losses of three steps may be. liger's come last: Triton's errors are of no class that can be named without it."""


def switches(setting: Setting) -> Iterator[Measured]:
    """The losses of every switch on the parity base, against those of the CPU."""
    # torch reads it once, at the process's first product, which is none of run.deterministic's.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    expected = json.loads(done.stdout.splitlines()[-1])
    for name, (changes, _, most) in SWITCHES.items():
        title, found = f"{name}: losses against the CPU's", losses(changes)
        wrong = next((each for each in (found, expected[name]) if isinstance(each, str)), "")
        if wrong:
            yield Measured(title, note=wrong)
            continue
        apart = max(abs(ours - theirs) for ours, theirs in zip(found, expected[name], strict=True))
        yield Measured(title, apart, "", most, is_limit=True)


def losses(changes: Mapping[str, Any]) -> list[float] | str:
    """Of three steps on the parity base; or why there are none."""
    AcceleratorState._reset_state(True)
    precision = {"run": {"precision": "fp32"} | changes.get("run", {})}
    with tempfile.TemporaryDirectory() as folder:
        try:
            train(make_recipe(tables(Path(folder), **{"train": {"epochs": 3}, **changes, **precision})))
        except _WRONG as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return [line["loss"] for line in metrics(Path(folder, "run"))]


def benched(setting: Setting, recipe: Recipe) -> dict[str, float]:
    """`bench` on memory that nothing else has."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return bench(recipe, steps(setting), setting.rounds)


def steps(setting: Setting) -> int:
    return 1 if setting.is_tiny else 4


def recipe_for(
    setting: Setting, batch: int, a_image: int = 1, share: bool = False, base: Path | None = None, **model: Any
) -> Recipe:
    """One figure's recipe, and its data.

    Args:
        a_image: Questions on each image.
        share: Run an image's prefix once for all of its questions.
    """
    tiny, folder = setting.is_tiny, setting.folder
    data = make_data(folder / f"{a_image}", batch * steps(setting), a_image, 56 if tiny else 336)
    where = base or make_base(folder / "base", tiny)
    return make_recipe(
        {
            "run": {"name": "gpu", "output_dir": str(folder / "run"), "precision": "fp32" if tiny else "bf16"},
            "model": {"base": str(where), "lora": {"rank": 8 if tiny else 128, "alpha": 16 if tiny else 256}, **model},
            "data": {"train": str(data), "workers": 0 if tiny else 4, "share_prefix": share, "max_length": 4096},
            "train": {"per_device_batch_size": batch},
        }
    )


def lora(title: str, keys: Mapping[str, Any], target: float | None, patched: bool = False) -> Figure:
    """LoRA on 8 rows without checkpointing: the share of the measured rate, of the nominal one, and tokens a second."""

    def measure(setting: Setting) -> Iterator[Measured]:
        own = [name for name in ("lighten_lora", "lighten_decoder") if hasattr(objective_file, name)]
        if patched and not own:
            yield Measured(title, note="this version has no layers of its own")
            return
        for name in own if patched else ():
            setattr(objective_file, name, lambda _model: None)
        try:
            found = benched(setting, recipe_for(setting, 2 if setting.is_tiny else 8, **keys))
        except _WRONG as error:
            yield Measured(title, note=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
            return
        yield Measured(f"{title}, of the measured rate", 100 * found["mfu"], "%", target)
        if nominal := nominal_rate():
            rate = matrix_rate(setting.device, torch.bfloat16)
            yield Measured(f"{title}, of the nominal rate", 100 * found["mfu"] * rate / nominal[0], "%")
        yield Measured(f"{title}, speed", found["tokens_per_s"], "tokens/s")
        yield Measured(f"{title}, peak", found["peak_bytes"] / GIB, "GiB")

    return Figure(title, measure)


def qlora(setting: Setting) -> Iterator[Measured]:
    """Against LoRA at 16,000 tokens a micro-batch, and its peak at 1,300; layers are computed again."""
    many = 4 if setting.is_tiny else 25
    whole = benched(setting, recipe_for(setting, many, gradient_checkpointing=True))
    four = {"gradient_checkpointing": True, "quantization": {"bits": 4}}
    packed = benched(setting, recipe_for(setting, many, **four))
    yield Measured("QLoRA nf4 over LoRA, tokens/s", packed["tokens_per_s"] / whole["tokens_per_s"], "x", 0.9)
    peak = benched(setting, recipe_for(setting, 2, **four))["peak_bytes"]
    yield Measured("QLoRA nf4, peak at 1,300 tokens a micro-batch", peak / GIB, "GiB", 12e9 / GIB, is_limit=True)


def shared(setting: Setting) -> Iterator[Measured]:
    """Five questions on each image."""
    batch = 5 if setting.is_tiny else 25
    together, apart = (
        benched(setting, recipe_for(setting, batch, 5, share, gradient_checkpointing=True)) for share in (True, False)
    )
    gain = together["examples_per_s"] / apart["examples_per_s"]
    yield Measured("five questions an image, shared over apart", gain, "x", 3)


def planned(setting: Setting) -> Iterator[Measured]:
    """What `plan` says of a step, and what the step takes."""
    measured, measure = list[int](), plan_file.measure_step

    def noting(*values: Any) -> int:
        measured.append(measure(*values))
        return measured[-1]

    plan_file.measure_step = noting
    for title, keys in {"LoRA": {}, "QLoRA nf4": {"quantization": {"bits": 4}}}.items():
        table = recipe_for(setting, 2 if setting.is_tiny else 8, gradient_checkpointing=True, **keys)
        found = plan(table, None, 8, probe=True)[0].total
        apart = 100 * abs(found / measured[-1] - 1)
        yield Measured(f"{title}: planned and allocated are apart", apart, "%", 5, is_limit=True)
        if torch.cuda.is_available():
            reserved = torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated()
            yield Measured(f"{title}: reserved over allocated", reserved, "x", 1.05, is_limit=True)


def loading(setting: Setting) -> Iterator[Measured]:
    """Main memory of this process alone, and time, while the base is read onto the device."""
    table = recipe_for(setting, 2)
    processing, peak = load_processing(table.model, "pad"), Peak()
    before = peak.take()["own"]
    dtype = torch.float32 if setting.is_tiny else torch.bfloat16
    load_model(table, processing, dtype=dtype, device=setting.device)
    wait_for(setting.device)
    yield Measured("loading, main memory", (peak.take()["own"] - before) / 1024, "GiB", 3, is_limit=True)


def resume(setting: Setting) -> Iterator[Measured]:
    """Two runs, and one that goes on from the middle of the first: weights that are not the same bit for bit."""
    runs = {"first": {}, "again": {}, "resumed": {"resume": "first/run/checkpoints/step-000002"}}
    exported: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, keys in runs.items():
            AcceleratorState._reset_state(True)
            folder = Path(place, name)
            given = {key: str(Path(place, value)) for key, value in keys.items()}
            changes = {
                "run": {"deterministic": True, "precision": "fp32" if setting.is_tiny else "bf16", **given},
                "model": {"lora": {"dropout": 0.1}},
                "train": {"per_device_batch_size": 2},
                "checkpoint": {"every": 2, "keep": 9},
            }
            try:
                train(make_recipe(tables(folder, **changes)))
            except _WRONG as error:
                yield Measured(f"resume, {name}", note=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
                return
            file = folder / "run" / "export" / "adapter_model.safetensors"
            exported[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in ("again", "resumed"):
        differs = float(exported[name] != exported["first"])
        yield Measured(f"run.deterministic, {name}: other bits than the first run's", differs, "", 0, is_limit=True)


def next_row(setting: Setting) -> Iterator[Measured]:
    """LoRA of LLaVA-NeXT's shapes: images of five tiles, layers computed again."""
    base = make_next(setting.folder / "next", setting.is_tiny)
    found = benched(setting, recipe_for(setting, 2, base=base, gradient_checkpointing=True))
    yield Measured("LLaVA-NeXT, LoRA, of the measured rate", 100 * found["mfu"], "%")
    yield Measured("LLaVA-NeXT, LoRA, speed", found["tokens_per_s"], "tokens/s")
    yield Measured("LLaVA-NeXT, LoRA, peak", found["peak_bytes"] / GIB, "GiB")


FIGURES = {
    "ceilings": Figure("what the card does at best", ceilings),
    "switches": Figure("losses of every switch against the CPU's", switches),
    "lora": lora("LoRA, 8 rows", {}, 55),
    "lora-peft": lora("LoRA, 8 rows, peft's and transformers' own layers", {}, None, patched=True),
    "lora-compile": lora("LoRA, 8 rows, model.compile", {"compile": True}, 55),
    "lora-liger": lora("LoRA, 8 rows, liger's kernels", {"kernels": "liger"}, 55),
    "qlora": Figure("QLoRA", qlora),
    "shared": Figure("shared prefixes", shared),
    "planned": Figure("planned against allocated", planned),
    "loading": Figure("main memory while the base is loaded", loading),
    "resume": Figure("resume, bit for bit", resume),
    "next": Figure("LLaVA-NeXT", next_row),
}
"""In the order in which they are worth most."""


if __name__ == "__main__":  # the CPU's losses, in fp32
    cpu = {name: losses(changes if other is None else other) for name, (changes, other, _) in SWITCHES.items()}
    print(json.dumps(cpu))
