"""The base that a recipe is made for: its configs, or its published sizes where the hub cannot be asked for them."""

import json
import shutil
from pathlib import Path
from typing import Any

from llava_accel.advice.known_sizes import DEFAULT, published_config, whole_name
from llava_accel.exceptions import UserError
from llava_accel.model.chat_template import choose_template
from llava_accel.model.files import resolve_folder
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import ModelTable, Recipe

DEFAULT_BASE = f"llava-hf/{DEFAULT}"
_SHIPPED = Path(__file__).parents[1] / "quickstart" / "base"


def find_configs(base: str, spare: Path) -> tuple[str, str]:
    """The folder with the configs and the tokenizer of a base; and what is assumed, "" where they are its own.

    Args:
        base: A folder, or the name of a model of the hub.
        spare: An empty folder, for configs of the published sizes.

    Raises:
        UserError: it is neither a folder nor a name that the hub could know.
    """
    try:
        return str(resolve_folder(base, "--base", weights=False)), ""
    except UserError:
        if Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") != 1:
            raise
    missing = f"{base} is not on this machine, and the hub has no such model within reach"
    return str(spare), f"{write_known(base, spare)}; {missing}"


def write_known(base: str, folder: Path) -> str:
    """Write configs of a base's published sizes, with the tokenizer that ships here; returns what that assumes.

    Args:
        base: The name of a model of the hub. For one that is not known, LLaVA-1.5-7B's sizes are taken.
    """
    config = published_config(base)
    _write(config or published_config(DEFAULT_BASE) or {}, folder)
    sizes = (
        f"the published sizes of {base}"
        if config
        else f"the sizes of LLaVA-1.5-7B, as those of {base} are not known here and may be many times as large"
    )
    return f"assumed: {sizes}. Lengths are counted with the small tokenizer that ships here, which makes more tokens"


def with_known_base(recipe: Recipe, spare: Path, *, always: bool = False) -> tuple[Recipe, str]:
    """The recipe with configs that are on this machine, for a plan; and what is assumed, "" if they are the base's own.

    Args:
        spare: An empty folder, for configs of the published sizes.
        always: Take published sizes where they are known, so that every machine plans the same.

    Raises:
        UserError: the base is neither here nor a name that the hub could know.
    """
    model = recipe.model
    name = whole_name(model.base, model.language_model, model.vision_tower)
    if always and published_config(name):
        assumed = write_known(name, spare)
    elif model.base:
        _, assumed = find_configs(model.base, spare)
    else:
        assumed = ""
        try:
            resolve_folder(model.language_model, "model.language_model", weights=False)
        except UserError:
            if not published_config(name):
                raise
            assumed = write_known(name, spare)
    if not assumed:
        return recipe, ""
    template = model.template if model.template == "plain" else "v1"  # for the tokenizer that ships here
    parts = {"base": str(spare), "language_model": "", "vision_tower": "", "projector": "", "template": template}
    return recipe.model_copy(update={"model": model.model_copy(update=parts)}), assumed


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


def known_template(processing: Processing) -> tuple[str, str]:
    """As `choose_name`, for a base of which only the sizes are known."""
    family = processing.base.family
    return family.template(processing.base.text), f"released {family.title} was trained so"


def load_configs(folder: str, template: str = "v1") -> Processing:
    """Tokenizer, image processor and config of a base."""
    return load_processing(ModelTable.model_validate({"base": folder, "template": template}), "auto")


def _write(published: dict[str, Any], folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(_SHIPPED / name, folder / name)
    shipped, processor = _read(_SHIPPED / "config.json"), _read(_SHIPPED / "processor_config.json")
    ids = {key: value for key, value in shipped["text_config"].items() if key.endswith("_token_id")}
    config = published | {"image_token_index": shipped["image_token_index"]}
    config["text_config"] = config["text_config"] | ids
    side = config["vision_config"]["image_size"]
    processor["patch_size"] = config["vision_config"]["patch_size"]
    processor["image_processor"] |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    for name, content in (("config.json", config), ("processor_config.json", processor)):
        (folder / name).write_text(json.dumps(content))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())
