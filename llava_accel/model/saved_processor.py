"""Processor, tokenizer and config as files that transformers 4 and 5 read alike: the same ids, pixels and positions."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llava_accel.data.text_encoder import parts_of
from llava_accel.model.files import read_json
from llava_accel.model.processing import Processing

_HOW_LOADED = ("backend", "is_local", "local_files_only", "name_or_path")
"""Keys in which transformers 5 writes down how a tokenizer was loaded."""


def save_processor(folder: Path, processing: Processing) -> None:
    """Write the processor with its tokenizer, image processor and chat template; `from_pretrained` restores each.

    transformers 5 puts the image processor's settings inside the processor's own, where version 4 does not look. The
    processors of some families hold one for videos, which needs torchvision to be created: for these families only the
    files are written (`Family.processor_files`).
    """
    processor = processing.processor
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    _write(path, {key: value for key, value in read_json(path).items() if key != "image_processor"})
    processor.image_processor.save_pretrained(folder)
    _mend_tokenizer(folder, processor.tokenizer)
    for name, settings in processing.base.family.processor_files(processing.base.config).items():
        _write(folder / name, {**read_json(folder / name), **settings})


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the tokenizer alone."""
    tokenizer.save_pretrained(folder)
    _mend_tokenizer(folder, tokenizer)


def mend_config(folder: Path) -> None:
    """Write the rope settings of a saved model where version 4 looks for them, too: else it takes its default, unsaid.

    Args:
        folder: Of a LLaVA that transformers saved.
    """
    path = folder / "config.json"
    config = read_json(path)
    rope: Any = dict(config["text_config"].get("rope_parameters") or {})
    if isinstance(rope.get("rope_theta"), (int, float)):  # else it has a table for each kind of layer
        both = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if rope.get("rope_type", "default") != "default":
            both["rope_scaling"] = rope
        _write(path, {**config, "text_config": {**config["text_config"], **both}})


def _mend_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Name a class that both versions know and that takes tokenizer.json as it is: classes of single models rebuild the
    tokenizer. Lists and names of special tokens go where both look for them."""
    path = folder / "tokenizer_config.json"
    written = read_json(path)
    named: Any = written.pop("model_specific_special_tokens", {})
    extra: Any = written.pop("extra_special_tokens", [])
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # Every token that is named here becomes special, so those that a text may hold are not.
    written |= {**named, "additional_special_tokens": [str(token) for token in extra if str(token) in special] or None}
    # Else version 4 makes `token_type_ids`, which the model's `generate` refuses.
    written.setdefault("model_input_names", ["input_ids", "attention_mask"])
    written["legacy"] = getattr(tokenizer, "legacy", written.get("legacy"))
    if pre_tokenizer := parts_of(tokenizer)["pre_tokenizer"]:
        written["add_prefix_space"] = pre_tokenizer.get("add_prefix_space")  # version 4 sets it as written here
    written = {key: value for key, value in written.items() if value is not None and key not in _HOW_LOADED}
    _write(path, written | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
