"""The end of a run: what the trained model makes of a few examples, and whether its export makes the same elsewhere."""

import gc
from pathlib import Path

import torch
from accelerate import Accelerator

from llava_accel.model.bases import find_base
from llava_accel.model.objective import Objective
from llava_accel.model.quantize import quantization_config
from llava_accel.recipe import Recipe
from llava_accel.run.backend import autocast, resolve_precision, whole_root
from llava_accel.run.console import Screen
from llava_accel.run.datasets import Part
from llava_accel.run.proof import Sample, compute_elsewhere, examples_of, prove, take_sample


def claim_of(recipe: Recipe, objective: Objective, part: Part, accelerator: Accelerator) -> Sample:
    """What the trained model computes. Every rank must call it, while its engine is still there."""
    examples, pixels = examples_of(part, recipe)
    with torch.no_grad(), autocast(recipe, accelerator), whole_root(objective):
        return take_sample(objective, examples, pixels, part.pictures.shape, accelerator.device)


def verify(claim: Sample, export: Path, recipe: Recipe, screen: Screen) -> None:
    """Load the export in another process, and compare. For the main process.

    Raises:
        ValueError: it does not load, or does not compute the same.
    """
    if reason := _not_plain(recipe):
        screen.line(f"{export}: not compared in a process of transformers and peft alone, as {reason}")
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_precision(recipe.run.precision, device)
    base = "" if recipe.model.train == "full" else str(find_base(recipe.model, weights=False).folder)
    quantization = quantization_config(recipe.model.quantization, dtype)
    with screen.bar("verify the export", 1) as bar:
        found = compute_elsewhere(
            claim, export, dtype=dtype, base=base, quantization=quantization, use_gpu=device.type == "cuda"
        )
        bar.advance()
    prove(claim, found, f"{export} in plain transformers and peft, against the trained model", dtype, screen)


def _not_plain(recipe: Recipe) -> str:
    """Why transformers cannot load what an adapter was trained on; empty where it can."""
    model = recipe.model
    if model.train == "full":
        return ""
    if not model.base:
        return (
            f"its base is made of parts ({model.language_model}): `llava_accel.export --to merged` makes a whole of it"
        )
    base = find_base(model, weights=False)
    if base.layout != "hub":
        return f"{model.base} is in the layout of LLaVA's own code: `llava_accel.export --to merged` converts it"
    if base.tower_overridden:
        return f"it was trained with the vision tower {model.vision_tower}: `llava_accel.export --to merged` keeps that"
    return ""
