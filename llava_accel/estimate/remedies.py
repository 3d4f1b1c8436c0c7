"""Settings with which a recipe takes less memory; none that its checks or the backend would refuse."""

from functools import reduce

from llava_accel.recipe import Recipe
from llava_accel.recipe.rules import conflicts
from llava_accel.recipe.toml import toml_value
from llava_accel.runtime.launch_profile import Backend, Profile

_SMALLER = {"adamw": "adamw_8bit", "adamw_8bit": "paged_adamw_8bit"}


def backend_of(layout: str) -> Backend:
    """The backend of one of `peak_memory.layouts`, by its name."""
    if layout.startswith("zero"):
        return "deepspeed"
    return {"ddp": "ddp", "fsdp2": "fsdp"}.get(layout, "none")  # pyright: ignore[reportReturnType]


def checkpointing(recipe: Recipe, backend: Backend) -> str:
    """The setting that computes activations again, as TOML; empty if it is set, or would be refused."""
    if recipe.model.gradient_checkpointing is True:
        return ""
    return _setting(recipe, backend, "model.gradient_checkpointing", True)


def fewer_bits(recipe: Recipe, backend: Backend) -> str:
    """The setting that quantises the base, as TOML; empty if it is quantised, or cannot be."""
    if recipe.model.quantization.bits <= 4:
        return ""
    return _setting(recipe, backend, "model.quantization.bits", 4)


def smaller_state(recipe: Recipe, backend: Backend) -> str:
    """The setting with which the optimizer keeps less, as TOML; empty if there is none."""
    smaller = _SMALLER.get(recipe.optim.optimizer)
    return _setting(recipe, backend, "optim.optimizer", smaller) if smaller else ""


def _setting(recipe: Recipe, backend: Backend, key: str, value: bool | int | str) -> str:
    """The setting as TOML; empty if the recipe would then be refused."""
    tables = recipe.model_dump()
    *path, name = key.split(".")
    reduce(dict.__getitem__, path, tables)[name] = value
    changed = Recipe.model_validate(tables)
    refused = conflicts(changed) or Profile(backend, {}).refuses(changed)
    return "" if refused else f"{key} = {toml_value(value)}"
