"""Nothing is advised that the recipe's checks, or those of the backend, then refuse."""

import re
from pathlib import Path

import pytest

from llava_accel.estimate.peak_memory import GIB, Layout, Plan, layouts
from llava_accel.estimate.remedies import backend_of, checkpointing, fewer_bits, smaller_state
from llava_accel.estimate.trace import Moment
from llava_accel.loop import memory_guard
from llava_accel.plan import verdict
from llava_accel.recipe import Recipe, load_recipe
from llava_accel.runtime.launch_profile import Profile

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
VARIANTS = (
    [], ["model.lora.variant=pissa"], ["model.lora.variant=olora"], ["optim.optimizer=adamw_8bit"],
    ["model.gradient_checkpointing=false"], ["model.gradient_checkpointing=2"], ["model.quantization.bits=8"],
    ["model.quantization.bits=16"], ["optim.optimizer=sgd"],
)  # fmt: skip
SETTING = re.compile(r'(\w+(?:\.\w+)+) = ("?[\w.]+"?)')


def usable(path: Path) -> list[list[str]]:
    """The changes with which the recipe itself loads."""
    found = []
    for words in VARIANTS:
        try:
            load_recipe(path, words)
        except ValueError:
            continue
        found.append(words)
    return found


def advised(recipe: Recipe, layout: Layout) -> list[str]:
    """Every sentence that advises something for a card that is too small."""
    too_large = Plan(layout, 100 * GIB, 0, 0, 0, 0, (Moment(GIB),))
    backend = backend_of(layout.name)
    return [
        verdict(too_large, 24.0, recipe),
        checkpointing(recipe, backend),
        fewer_bits(recipe, backend),
        smaller_state(recipe, backend),
    ]


@pytest.mark.filterwarnings("ignore::llava_accel.recipe.RecipeWarning")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_advice_of_plan_can_be_followed(path: Path) -> None:
    followed = 0
    for words in usable(path):
        recipe = load_recipe(path, words)
        for layout in layouts(8):
            if Profile(backend_of(layout.name), {}).refuses(recipe):
                continue
            for key, value in SETTING.findall(" ".join(advised(recipe, layout))):
                changed = load_recipe(path, [*words, f"{key}={value}"])
                assert changed != recipe, (words, key, value)
                assert not Profile(backend_of(layout.name), {}).refuses(changed), (words, layout.name, key, value)
                followed += 1
    assert followed > 20


@pytest.mark.filterwarnings("ignore::llava_accel.recipe.RecipeWarning")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_advice_of_a_run_out_of_memory_can_be_followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in usable(path):
        recipe = load_recipe(path, words)
        for layout in layouts(8):
            profile = Profile(backend_of(layout.name), {})
            if profile.refuses(recipe):
                continue
            monkeypatch.setattr(memory_guard, "read_profile", lambda profile=profile: profile)
            said = [memory_guard._step_remedy(0, recipe, 1), memory_guard._update_remedy(recipe)]
            said += [memory_guard._loading_remedy(recipe), memory_guard._step_remedy(1, recipe, 2)]
            for key, value in SETTING.findall(" ".join(said)):
                assert not profile.refuses(load_recipe(path, [*words, f"{key}={value}"]))


def test_a_model_that_is_trained_in_full_is_not_to_be_quantised() -> None:
    recipe = load_recipe(RECIPES[0].parent / "finetune_full.toml", ["model.gradient_checkpointing=false"])
    assert fewer_bits(recipe, "none") == "" and checkpointing(recipe, "none") == "model.gradient_checkpointing = true"
    assert smaller_state(recipe, "none") == 'optim.optimizer = "adamw_8bit"'
    assert smaller_state(recipe, "deepspeed") == smaller_state(recipe, "fsdp") == ""
