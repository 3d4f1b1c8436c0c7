"""The feature cache of a run: whether there is one, which store is the model's, and what fits into it."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from llava_accel.data.features import FeatureStore, FeatureWriter
from llava_accel.data.loader import cache_folder
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.run.console import Screen
from llava_accel.run.datasets import Part

_FORMAT = 1
_SPARE_DISK = 0.05  # share of the free disk that "auto" leaves alone


def may_cache(recipe: Recipe) -> bool:
    """Whether features of this recipe's tower are the same in every step."""
    return recipe.data.cache_features is not False and not recipe.model.train_vision


def may_park(recipe: Recipe) -> bool:
    """Whether the tower may leave the model: what is trained in full is saved with its tower."""
    return may_cache(recipe) and recipe.model.train != "full"


def attach_features(
    recipe: Recipe,
    processing: Processing,
    objective: Objective,
    parts: Sequence[Part | None],
    accelerator: Accelerator,
    screen: Screen,
) -> None:
    """Let loaders read stored features, and the objective store those that it computes, as far as the recipe wants it.

    Args:
        parts: All data of the run.
    """
    if not may_cache(recipe):
        return
    root = cache_folder(recipe.data.cache_dir) / "features"
    store = FeatureStore(root, features_key(objective.tower_name, processing, recipe))
    limit = int(recipe.data.cache_max_gb * 1e9)
    used = [part for part in parts if part is not None]
    if recipe.data.cache_features == "auto" and not _fits(store, processing, objective, used, limit):
        if accelerator.is_main_process:
            screen.line(
                f"vision features: those of {count_pictures(used):,} pictures would take "
                f"{count_pictures(used) * record_bytes(processing, objective) / 1e9:,.1f} GB and do not fit in "
                "data.cache_max_gb and on the disk; the tower runs in every step (cache_features = true keeps some)"
            )
        return
    for part in used:
        part.pictures.store = store
    objective.features = FeatureWriter(store, limit)
    screen.line(f"vision features: {len(store):,} pictures in {store.folder}")


def features_key(tower_name: str, processing: Processing, recipe: Recipe) -> str:
    """Name of the store: the tower, and all that decides what a picture file becomes before it."""
    settings = processing.processor.image_processor.to_dict()
    text = json.dumps([_FORMAT, tower_name, recipe.data.image_aspect, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def count_pictures(parts: Sequence[Part]) -> int:
    """Different pictures of the data, at most: pictures that stand alone and beside others count twice."""
    keys = np.concatenate([part.survey.image_keys[part.rows] for part in parts])
    sizes = np.concatenate([part.survey.num_images[part.rows] for part in parts])
    _, first = np.unique(keys, return_index=True)
    return int(sizes[first].sum())


def record_bytes(processing: Processing, objective: Objective) -> int:
    """Disk for the features of one picture."""
    item = next(objective.tower.parameters()).element_size()
    return processing.num_image_tokens * int(processing.base.vision.hidden_size) * item


def _fits(store: FeatureStore, processing: Processing, objective: Objective, parts: Sequence[Part], limit: int) -> bool:
    present, root = store.num_bytes(), store.root
    others = sum(file.stat().st_size for file in Path(root).glob("*/*.safetensors")) - present
    wanted = count_pictures(parts) * record_bytes(processing, objective)
    free = (1 - _SPARE_DISK) * shutil.disk_usage(root).free
    return wanted <= limit - others and wanted - present <= free
