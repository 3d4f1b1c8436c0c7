"""The reference of preference tuning: the log-probabilities of all answers before training, which every step compares with.

It is computed once, with the weights that training starts from, so no second model is ever in memory. It is kept in the
cache under a name made from all that decides it, and in the run folder, where a resumed run finds it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from llava_accel.data.loader import Loaded, tensor
from llava_accel.exceptions import UserError
from llava_accel.model.build import LoadedModel
from llava_accel.model.files import resolve_folder
from llava_accel.model.lora import FROM_WEIGHTS
from llava_accel.model.objective import Objective
from llava_accel.model.preference import Preference
from llava_accel.model.processing import Processing
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import autocast, resolve_precision, whole_root
from llava_accel.setup.datasets import Part, content, survey_key
from llava_accel.setup.micro_batches import load, own_batches
from llava_accel.sources.problems import some
from llava_accel.storage.atomic import atomic_file
from llava_accel.storage.kept_files import cache_folder, store, stored

REFERENCE = "reference.safetensors"
"""Its file in the run folder."""
_FORMAT = 1
_Found = Float[np.ndarray, "rows 2"]


def attach_reference(
    run: RunContext,
    objective: Objective,
    loaded: LoadedModel,
    processing: Processing,
    parts: Sequence[Part | None],
    source: Path | None = None,
    *,
    keeps: bool = False,
) -> None:
    """Give loaders the reference of all pairs; does nothing for other objectives. Every rank must call this.

    Args:
        objective: Ready to run, with the weights that training starts from, or with those of `source`, if there is one.
        parts: All data of the run.
        source: The checkpoint that the run goes on from, if there is one: the reference beside it is used.
        keeps: Also keep the reference in the run folder.

    Raises:
        UserError: the run goes on from a checkpoint, and both the reference and the weights to compute it with are gone.
        DataError: a record is broken now, and the recipe says "error".
    """
    if not isinstance(objective, Preference):
        return
    references: dict[str, _Found] = {}
    corpora = {id(part.corpus): part for part in parts if part is not None}
    for key, first in corpora.items():
        same = [part for part in parts if part is not None and id(part.corpus) == key]
        rows = np.unique(np.concatenate([part.rows for part in same]))
        name = _name(run, loaded, processing, first)
        known = _known(run, name, source)
        if known is None:
            table = "data.train" if parts[0] and parts[0].corpus is first.corpus else "data.eval"
            with _as_before(run, objective, source, table) if source else nullcontext():
                known = _computed(run, objective, first, rows, name)
        first.corpus.reference = references[name] = known
    if keeps and run.accelerator.is_main_process:
        with atomic_file(Path(run.recipe.run.output_dir) / REFERENCE) as unfinished:
            save_file(references, unfinished)
    run.accelerator.wait_for_everyone()


def _name(run: RunContext, loaded: LoadedModel, processing: Processing, part: Part) -> str:
    """A digest of all that decides the reference: the weights that training starts from, the records, and the precision."""
    recipe = run.recipe
    table, lora = recipe.model, recipe.model.lora
    changes_weights = table.train == "lora" and lora.variant in FROM_WEIGHTS
    facts = {
        "format": _FORMAT,
        "base": loaded.fingerprint,
        "trained": [
            _digests(name, f"model.{key}") for key in ("adapter", "projector") if (name := getattr(table, key))
        ],
        "quantization": table.quantization.model_dump() if table.quantization.bits < 16 else None,
        "start": [lora.model_dump(), recipe.run.seed] if changes_weights else None,
        "new": recipe.run.seed if not (table.base or table.projector) else None,
        "precision": str(resolve_precision(recipe.run.precision, run.accelerator.device)),
        "records": [survey_key(recipe, processing), content(run, part), processing.image_aspect],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _digests(name: str, key: str) -> list[str]:
    """The SHA-256 of each file of weights that a key of the recipe names."""
    path = Path(os.path.expanduser(name))
    folder = path if path.is_file() else resolve_folder(name, key)
    files = [path] if path.is_file() else sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    digests = []
    for file in files:
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return digests


def _known(run: RunContext, name: str, source: Path | None) -> _Found | None:
    """The reference as computed before, by this run if it goes on from a checkpoint, or by another; else None."""
    places = [cache_folder(run.recipe.data.cache_dir) / "reference" / f"{name}.safetensors"]
    if source is not None:
        places = [Path(run.recipe.run.output_dir) / REFERENCE, source.parents[1] / REFERENCE, *places]
    return next((kept for place in places if (kept := stored(place, partial(_read, name))) is not None), None)


def _as_before(run: RunContext, objective: Preference, source: Path, key: str) -> AbstractContextManager[None]:
    """In the block, the model computes as before training, although it holds trained weights.

    Args:
        source: The checkpoint whose weights the model holds.
        key: Names the data.

    Raises:
        UserError: the weights from before training are gone.
    """
    table, path = run.recipe.model, Path(run.recipe.run.output_dir) / REFERENCE
    lora = table.lora
    changed = {
        f"model.train = {table.train!r}": table.train != "lora",
        "model.adapter": bool(table.adapter),
        "model.train_projector": table.train_projector,
        "model.train_vision": table.train_vision,
        f"model.lora.bias = {lora.bias!r}": lora.bias != "none",
        f"model.lora.variant = {lora.variant!r}": lora.variant in FROM_WEIGHTS,
    }
    if reasons := [name for name, is_so in changed.items() if is_so]:
        raise UserError(
            f"run.resume: {path} is missing, or lacks {key} as it is now. It holds the log-probabilities of pairs before "
            f"training. {source} no longer has the weights to compute them, because of {some(reasons)}. "
            f"Set {key} back, copy the file there from the folder of the run, or start a new run from its weights with "
            "model.adapter"
        )
    assert isinstance(objective.model, PeftModel)
    return objective.model.disable_adapter()


def _read(name: str, path: Path) -> _Found | None:
    with safe_open(path, framework="numpy") as file:
        return file.get_tensor(name) if name in file.keys() else None


def _computed(run: RunContext, objective: Preference, part: Part, rows: Int[np.ndarray, "rows"], name: str) -> _Found:
    """The reference of these rows of the corpus, NaN for its other rows. Every rank computes its share."""
    recipe, accelerator = run.recipe, run.accelerator
    own = own_batches(rows, part, recipe.train.per_device_batch_size, accelerator)
    log_probs = torch.zeros((len(part.corpus), 2), dtype=torch.float32, device=accelerator.device)
    is_known = torch.zeros(len(part.corpus), dtype=torch.float32, device=accelerator.device)
    was_training = objective.training
    objective.eval()
    windows = load(run, part, [[batch] for batch in own])
    with torch.no_grad(), autocast(recipe, accelerator), whole_root(objective):
        with run.console.bar("reference", len(own)) as bar:
            for batch, (loaded,) in zip(own, windows, strict=True):
                there = set(tensor(loaded, "indices").tolist())
                places = [row for row in batch if row in there]
                log_probs[places] = _log_probs(objective, loaded).view(len(places), 2)
                is_known[places] = 1.0
                bar.advance()
    objective.train(was_training)
    values, counts = (accelerator.reduce(each, reduction="sum") for each in (log_probs, is_known))
    assert isinstance(values, Tensor) and isinstance(counts, Tensor)
    values[counts == 0] = torch.nan
    result = values.cpu().numpy()
    if accelerator.is_main_process:
        path = cache_folder(recipe.data.cache_dir) / "reference" / f"{name}.safetensors"
        store(path, lambda unfinished: save_file({name: result}, unfinished))
    return result


def _log_probs(objective: Preference, loaded: Loaded) -> Float[Tensor, "examples"]:
    hidden, _ = objective.hidden_at_targets(**loaded)  # pyright: ignore[reportArgumentType]
    number = 2 * len(tensor(loaded, "indices"))
    return objective.answer_log_probs(hidden, tensor(loaded, "target_ids"), tensor(loaded, "target_examples"), number)
