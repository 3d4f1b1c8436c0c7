"""The base that a recipe is made for: its configs, or known shapes where the hub cannot be asked for them."""

import json
import shutil
from pathlib import Path
from typing import Any

from llava_accel.exceptions import UserError
from llava_accel.model.chat_template import choose_template
from llava_accel.model.files import resolve_folder
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import ModelTable

DEFAULT_BASE = "llava-hf/llava-1.5-7b-hf"
_SHIPPED = Path(__file__).parents[1] / "quickstart" / "base"
_TEXT = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 4096, "vocab_size": 32064,
}  # fmt: skip
_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_SIDE, _PATCHES = 336, 576


def find_configs(base: str, spare: Path) -> tuple[str, str]:
    """The folder with the configs and the tokenizer of a base; and what is assumed, "" where they are its own.

    Args:
        base: A folder, or the name of a model of the hub.
        spare: An empty folder, for the configs of LLaVA-1.5-7B's shapes.

    Raises:
        UserError: it is neither a folder nor a name that the hub could know.
    """
    try:
        return str(resolve_folder(base, "--base", weights=False)), ""
    except UserError:
        if Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
            raise
    _write_known(spare)
    return str(spare), (
        f"assumed: {base} is not on this machine, and the hub has no such model within reach. Sizes are those of "
        "LLaVA-1.5-7B, and lengths are counted with the small tokenizer that ships here, which makes more tokens. "
        "Once the base is there, run init again with --force"
    )


def choose_name(processing: Processing) -> tuple[str, str]:
    """`model.template` for a base, and why."""
    folder, tokenizer = processing.base.folder, processing.processor.tokenizer
    own, _ = choose_template("auto", folder, tokenizer)
    base = processing.base
    name = base.family.template(base.text) if base.family.is_tiled or own is None else "v1"
    if own is None:
        return name, f"the base has no chat template; released {base.family.title} has this one"
    if not choose_template(name, folder, tokenizer)[1]:
        whose = (
            "Vicuna's, as LLaVA-1.5's" if name == "v1" else f"of this form; released {base.family.title} was trained so"
        )
        return name, f"the base's chat template is {whose}"
    return "auto", "the base has a chat template of its own"


def load_configs(folder: str, template: str = "v1") -> Processing:
    """Tokenizer, image processor and config of a base."""
    return load_processing(ModelTable.model_validate({"base": folder, "template": template}), "auto")


def _write_known(folder: Path) -> None:
    """LLaVA-1.5-7B's configs, with the tokenizer that ships here."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_SHIPPED / name, folder / name)
    config = _read(_SHIPPED / "config.json")
    config["text_config"] |= _TEXT
    config["vision_config"] |= _VISION
    config["image_seq_length"] = _PATCHES
    processor = _read(_SHIPPED / "processor_config.json")
    processor["patch_size"] = _VISION["patch_size"]
    processor["image_processor"] |= {
        "size": {"shortest_edge": _SIDE},
        "crop_size": {"height": _SIDE, "width": _SIDE},
    }
    for name, content in (("config.json", config), ("processor_config.json", processor)):
        (folder / name).write_text(json.dumps(content))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
