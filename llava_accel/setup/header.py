"""Prints what a run is about before any weight is read: data, steps, device, what is trained, where log lines go."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llava_accel.console.output import counted
from llava_accel.data.sampler import Order
from llava_accel.model.precision import precision_name
from llava_accel.recipe import Recipe
from llava_accel.recipe.inputs import ModelTable
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.devices import bf16_remark, device_name, why_cpu
from llava_accel.runtime.engines import resolve_precision
from llava_accel.runtime.launch_profile import read_profile
from llava_accel.setup.datasets import Part
from llava_accel.setup.figures import figures_of, write_figures
from llava_accel.setup.state import count_steps

_SHOWN_SOURCES = 6


def print_header(run: RunContext, order: Order, training: Part, held_out: Part | None, source: Path | None) -> None:
    """Print what a person should see before a run takes hours, and write the figures of its data into its folder."""
    recipe = run.recipe
    if not run.accelerator.is_main_process:
        return
    figures = figures_of(recipe, training, held_out, order)
    write_figures(Path(recipe.run.output_dir), figures)
    facts = {
        "folder": f"{recipe.run.output_dir}{f'; goes on from {source}' if source else ''}",
        "data": _data(figures["train"], training),
        **({"mix": _mix(figures["sources"])} if len(figures["sources"]) > 1 else {}),
        "held out": _held_out(recipe, held_out),
        "steps": _steps(recipe, order),
        "batch": _batch(recipe, run.accelerator.num_processes),
        "device": describe_device(recipe, run.accelerator.device, run.accelerator.num_processes),
        "trains": _trains(recipe.model),
        "logs": " and ".join(("metrics.jsonl", *recipe.log.trackers)),
    }
    run.console.pairs(f"run {recipe.run.name}", facts)
    if run.accelerator.device.type == "cpu":
        run.console.line(f"training on the CPU because {why_cpu(wants_cpu=read_profile().wants_cpu)}")
        if remark := bf16_remark(recipe.run.precision):
            run.console.line(remark)


def _data(figures: Mapping[str, Any], part: Part) -> str:
    return f"{len(part):,} records with {counted(figures['images'], 'image')}, from {_sources(part)}"


def _sources(part: Part) -> str:
    names = list(dict.fromkeys(source.name for source in part.corpus.sources))
    return names[0] if len(names) == 1 else f"{len(names)} sources"


def _mix(sources: Sequence[Mapping[str, Any]]) -> str:
    """The share of every source in what an epoch trains on."""
    shown = [f"{source['name']} {100 * source['share']:.0f} %" for source in sources[:_SHOWN_SOURCES]]
    return ", ".join(shown) + (f" and {len(sources) - len(shown)} more" if len(sources) > len(shown) else "")


def _held_out(recipe: Recipe, part: Part | None) -> str:
    if part is None:
        return "nothing, so how well it answers is not measured (data.eval, data.eval_fraction)"
    place = f"of {_sources(part)}" if recipe.data.eval else f"(data.eval_fraction = {recipe.data.eval_fraction:g})"
    asked = f", of which each evaluation asks {recipe.eval.limit:,}" if 0 < recipe.eval.limit < len(part) else ""
    return f"{len(part):,} records {place}{asked}"


def _steps(recipe: Recipe, order: Order) -> str:
    steps, epoch = count_steps(recipe.train, order), order.steps_per_epoch
    epochs = f"{steps / epoch:.3g} epoch{'s' if steps != epoch else ''}"
    return f"{steps:,} = {epochs} of {counted(epoch, 'step')}"


def _batch(recipe: Recipe, ranks: int) -> str:
    train = recipe.train
    size = train.per_device_batch_size * train.accumulation_steps * ranks
    factors = f"{train.per_device_batch_size} x accumulation {train.accumulation_steps} x {ranks}"
    return f"{size:,} examples a step = {factors} process{'es' if ranks > 1 else ''}"


def describe_device(recipe: Recipe, device: torch.device, ranks: int) -> str:
    """Device, precision and ranks."""
    dtype = precision_name(resolve_precision(recipe.run.precision, device))
    several = f"{ranks} x " if ranks > 1 else ""
    with_title = f", {read_profile().title}" if ranks > 1 else ""
    return f"{several}{device_name(device)}, {dtype}{with_title}"


def _trains(model: ModelTable) -> str:
    names = {
        "lora": f"LoRA of rank {model.lora.rank}{', also on the projector' if model.lora.projector else ''}",
        "full": "the language model",
        "projector": "the projector",
    }
    parts = [names[model.train]]
    parts += ["the projector"] if model.train_projector and model.train != "projector" else []
    parts += ["the vision tower"] if model.train_vision else []
    bits = model.quantization.bits
    *first, last = parts
    text = f"{', '.join(first)} and {last}" if first else last
    return f"{text}{f'; the base in {bits} bits' if bits != 16 else ''}"
