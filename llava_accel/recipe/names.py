"""Which keys a recipe has, their defaults, and which of them a wrong name may have meant."""

import difflib
from collections.abc import Iterable
from itertools import islice

from llava_accel.recipe.tables import Recipe
from llava_accel.recipe.toml import flatten

REQUIRED = {"run": {"name": "okvqa_qlora"}, "data": {"train": "data/okvqa/train.jsonl"}}
"""The keys without a default, each with an example."""

_ALL = flatten(Recipe.model_validate(REQUIRED).model_dump())
FREE_TABLES = ("data.columns",)
"""Tables that are empty by default, and hold what the user names."""
KEYS = (*_ALL, *FREE_TABLES)
DEFAULTS = {key: value for key, value in _ALL.items() if key not in flatten(REQUIRED)}

# Names that LLaVA's scripts, the Hugging Face Trainer and other programs use for the same thing, where they are not alike.
OTHER_NAMES = {
    "bf16": "run.precision", "fp16": "run.precision",
    "model_name_or_path": "model.base", "version": "model.template", "pretrain_mm_mlp_adapter": "model.projector",
    "tune_mm_mlp_adapter": "model.train", "freeze_mm_mlp_adapter": "model.train_projector",
    "lora_alpha": "model.lora.alpha", "lora_r": "model.lora.rank", "target_modules": "model.lora.targets",
    "data_path": "data.train", "image_folder": "data.images", "image_aspect_ratio": "data.image_aspect",
    "model_max_length": "data.max_length", "group_by_modality_length": "data.group_by_length",
    "disable_shuffling": "data.shuffle", "dataset_shuffle": "data.shuffle",
    "lr": "optim.learning_rate", "mm_projector_lr": "optim.projector_learning_rate",
    "lr_scheduler_type": "optim.schedule", "warmup_ratio": "optim.warmup_fraction",
    "num_train_epochs": "train.epochs", "gradient_accumulation_steps": "train.accumulation_steps",
    "per_device_train_batch_size": "train.per_device_batch_size",
    "rpo_alpha": "preference.sft_weight", "pref_beta": "preference.beta", "pref_loss": "preference.loss",
    "pref_ftx": "preference.sft_weight", "loss_type": "preference.loss", "rlhf_type": "train.objective",
    "save_steps": "checkpoint.every", "save_total_limit": "checkpoint.keep",
    "logging_steps": "log.every", "report_to": "log.trackers",
}  # fmt: skip

_LONGEST_NAME = 100  # characters; comparing takes as many steps for each key
_ALIKE = 0.75  # from this ratio of difflib on, two names count as one name misspelt


def nearest_keys(key: str, keys: Iterable[str] = KEYS) -> tuple[str, ...]:
    """The keys that `key` may have meant, likeliest first; none where nothing is similar.

    In this order: the same name in another table (at most three), what other programs call it, and the key that is
    most alike in its name and as a whole, or has it as a part ("warmup").
    """
    if len(key) > _LONGEST_NAME:
        return ()
    name = _name(key)
    scores = {valid: (_likeness(name, _name(valid)), _likeness(key, valid)) for valid in keys}
    ranked = sorted(scores, key=lambda valid: sum(scores[valid]), reverse=True)
    if same_name := tuple(valid for valid in ranked if _name(valid) == name):
        return same_name[:3]
    if OTHER_NAMES.get(name) in scores:
        return (OTHER_NAMES[name],)
    near = (valid for valid in ranked if max(scores[valid]) >= _ALIKE or (len(name) >= 5 and name in _name(valid)))
    return tuple(islice(near, 1))


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
