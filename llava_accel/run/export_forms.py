"""The three forms of an export, each written and then compared with what was trained."""

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

from llava_accel.model.agreement import compare, probe
from llava_accel.model.bases import Base, find_base
from llava_accel.model.build import load_model
from llava_accel.model.export_hf import save_merged, save_peft
from llava_accel.model.export_original import (
    read_original,
    save_original_adapter,
    save_original_model,
    save_original_projector,
)
from llava_accel.model.lora import Trainable
from llava_accel.model.original_config import original_config, place_tower
from llava_accel.model.processing import load_processing
from llava_accel.recipe import ModelTable
from llava_accel.run.card import Form
from llava_accel.run.dialogue import stop_ids
from llava_accel.run.exports import Job
from llava_accel.run.proof import compute_elsewhere, prove
from llava_accel.run.trained import Loaded


def write_peft(job: Job, folder: Path) -> dict[str, Any]:
    """One adapter with the projector inside, compared through `PeftModel.from_pretrained` over a fresh base."""
    if job.trained.kind != "lora":
        held = "a whole model" if job.trained.kind == "model" else "a projector"
        raise ValueError(f"{job.trained.folder} holds no adapter but {held}. Use --to merged or --to llava")
    base, table = find_base(job.recipe.model), job.recipe.model
    if base.layout == "parts" or (table.vision_tower and not _is_own_tower(table, base)):
        raise ValueError(
            f"{job.trained.folder} was trained on {table.base or table.language_model} with the vision tower "
            f"{table.vision_tower}, so no one folder is its base. Use --to merged"
        )
    loaded = job.load()
    facts, processing, dtype = _facts(job, loaded), loaded.processing, loaded.objective.llava.dtype
    sample, expected = job.sample(loaded, *job.examples(processing)), probe(loaded.objective.llava, processing)
    assert isinstance(loaded.objective.model, PeftModel)
    save_peft(folder, loaded.objective.model, processing)
    del loaded
    _free()
    name, use_gpu = "adapter over a fresh base, against the trained model", job.device.type == "cuda"
    if base.layout == "hub":
        found = compute_elsewhere(sample, folder, dtype=dtype, base=str(base.folder), use_gpu=use_gpu)
        prove(sample, found, name, dtype, job.screen)
        return facts
    plain = load_model(job.recipe, processing, dtype=dtype, device=None).model
    job.screen.line(
        f"note: transformers cannot load {table.base}, which is in the layout of LLaVA's own code. Convert it once "
        f"and use the result as the base: python -m llava_accel.export {table.base} --to merged "
        f"--out {Path(table.base).name}-hf"
    )
    with warnings.catch_warnings():
        # peft asks for an attribute that transformers 5 is about to rename.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        again = PeftModel.from_pretrained(plain, str(folder)).get_base_model()
    assert isinstance(again, LlavaForConditionalGeneration)
    found = probe(again.to(job.device), processing)  # pyright: ignore[reportArgumentType]
    job.check(name, expected, found, dtype)
    return facts


def write_merged(job: Job, folder: Path) -> dict[str, Any]:
    """One model folder of transformers, loaded again by transformers alone and compared."""
    bits, quantised, without = job.trained.recipe.model.quantization.bits, None, None
    examples = job.examples(load_processing(job.recipe.model, job.recipe.data.image_aspect))
    if bits < 16:
        loaded = job.load(as_trained=True)
        quantised = job.sample(loaded, *examples).logits
        del loaded
        _free()
    loaded = job.load()
    model, processing, facts = loaded.objective.model, loaded.processing, _facts(job, loaded)
    assert isinstance(model, Trainable)
    computed, stored = loaded.objective.llava.dtype, job.dtype or job.stored
    sample = job.sample(loaded, *examples)
    if isinstance(model, PeftModel) and job.recipe.model.lora.bias == "none":  # trained biases could not be disabled
        with model.disable_adapter():
            without = job.sample(loaded, *examples).logits
    save_merged(folder, model, processing, stored, stop_ids(job.recipe, processing))
    del loaded, model
    _free()
    found = compute_elsewhere(sample, folder, dtype=computed, use_gpu=job.device.type == "cuda")
    is_merged = job.trained.kind == "lora"
    name = "merged model, against 16-bit base + adapter" if is_merged else "exported model, against its source"
    difference = prove(sample, found, name, stored, job.screen).difference
    update = 0.0 if without is None else compare(sample.logits, without).difference
    if stored != torch.float32 and 0 < update < 2 * difference:
        raise ValueError(
            f"the merged model is no nearer to the trained one than the base is: {str(stored).removeprefix('torch.')} "
            "is too coarse for so small an update. Use --dtype fp32, or --to peft"
        )
    if quantised is not None:
        table = job.trained.recipe.model.quantization
        kind = f" ({table.type})" if bits == 4 else ""
        job.screen.line(
            f"the adapter was trained over the base in {bits} bits{kind}, and is merged into its 16-bit weights: what "
            "rounding to so few bits had changed, and the adapter made up for, is not in them"
        )
        job.screen.line(
            f"merged model, against {bits}-bit base + adapter as trained: {compare(quantised, found['logits'])}"
        )
    return facts


def write_llava(job: Job, folder: Path) -> dict[str, Any]:
    """The folder that LLaVA's own code writes, read back and compared weight by weight."""
    loaded, origin, is_whole = job.load(), _origin(job), job.trained.kind == "model"
    model, processing, recipe = loaded.objective.model, loaded.processing, job.recipe
    assert isinstance(model, Trainable)
    tower = place_tower(folder, loaded.objective, processing.base, origin, recipe, is_whole)
    config = original_config(processing.base, origin, recipe, tower)
    if isinstance(model, PeftModel):
        written = save_original_adapter(folder, model, config)
    elif is_whole:
        written = save_original_model(folder, model, processing, config, origin, job.dtype or job.stored)
    else:
        written = save_original_projector(folder, model, config)
    found = read_original(folder)
    if written.keys() != found.keys() or any(not torch.equal(found[name], t.cpu()) for name, t in written.items()):
        raise ValueError(f"{folder}: what was written does not come back as it was. Look at the disk, and try again")
    job.screen.line(f"LLaVA's layout: {len(found)} weights written, read back and equal; mm_vision_tower is {tower!r}")
    return _facts(job, loaded)


FORMS: dict[Form, Callable[[Job, Path], dict[str, Any]]] = {
    "peft": write_peft,
    "merged": write_merged,
    "llava": write_llava,
}
"""By the values of `--to`."""


def _is_own_tower(table: ModelTable, base: Base) -> bool:
    """Whether the tower that the recipe names is the one that the base names itself."""
    own = find_base(table.model_copy(update={"vision_tower": ""}), weights=False)
    return base.tower is not None and own.tower is not None and own.tower.resolve() == base.tower.resolve()


def _origin(job: Job) -> Base | None:
    """What the model was trained on: itself if it was only converted, None where that is not here any more."""
    trained = job.trained
    if trained.kind != "model" or trained.own is None:
        return find_base(trained.recipe.model, weights=False)
    try:
        return find_base(trained.own.model, weights=False)
    except ValueError as error:
        job.screen.line(f"note: config.json and tokenizer are made anew, as the base is not here: {error}")
        return None


def _facts(job: Job, loaded: Loaded) -> dict[str, Any]:
    """What is known of a model that this package has not trained; prints what the user should know of it."""
    for note in loaded.notes:
        job.screen.line(note)
    model, kind = job.recipe.model, job.trained.kind
    return {
        "base": model.base or model.language_model,
        "base_layout": loaded.processing.base.layout,
        "base_fingerprint": loaded.base.fingerprint,
        "train": None if kind == "model" else kind,
        "template": model.template,
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
