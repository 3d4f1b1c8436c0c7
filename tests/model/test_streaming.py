"""Weights that go to a card do so one after the other: main memory never holds them together."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_accel import compat
from llava_accel.model import build
from llava_accel.model.build import load_model
from llava_accel.model.processing import load_processing
from llava_accel.model.weights import gather, tower_stand_ins
from llava_accel.recipe import Recipe, make_recipe

CARD = torch.device("meta")
"""Stands in for a card: what is moved there leaves main memory. It keeps no numbers."""
WORKERS = 4
"""Threads of transformers that read."""


def recipe_for(base: Path, bits: int = 16) -> Recipe:
    model = {"base": str(base), "quantization": {"bits": bits}}
    return make_recipe({"run": {"name": "t"}, "model": model, "data": {"train": "x.json"}})


class Counted:
    """A weight on disk that notes how many of those that were read are in memory."""

    alive = most = total = 0

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, key: object) -> Tensor:
        # Read in the type of the file: the copy in the type that is asked for is another tensor.
        read = self._stored[key].clone()
        if key is Ellipsis:
            Counted.total += 1
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)
            weakref.finalize(read.untyped_storage(), self._leave)
        return read

    @staticmethod
    def _leave() -> None:
        Counted.alive -= 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Counts from zero what `load_model` reads whole."""
    Counted.alive = Counted.most = Counted.total = 0

    def load(model_class: Any, config: Any, state: Any, *arguments: Any, **settings: Any) -> Any:
        watched = {name: each if isinstance(each, Tensor) else Counted(each) for name, each in state.items()}
        return original(model_class, config, watched, *arguments, **settings)

    original = compat.load_model
    monkeypatch.setattr(build.compat, "load_model", load)
    return Counted


def load(recipe: Recipe, device: torch.device | None, **settings: Any) -> Any:
    processing = load_processing(recipe.model, "pad")
    return load_model(recipe, processing, dtype=torch.float32, device=device, **settings).model


def test_on_its_way_to_a_card_a_weight_is_in_memory_alone(llava_folder: Path, counted: type[Counted]) -> None:
    model = load(recipe_for(llava_folder), CARD)
    assert {parameter.device for parameter in model.parameters()} == {CARD}
    assert counted.total > 40 and counted.most <= WORKERS + 1 and counted.alive == 0


def test_on_a_cpu_all_of_them_stay_and_the_count_sees_it(llava_folder: Path, counted: type[Counted]) -> None:
    model = load(recipe_for(llava_folder), torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert counted.most == counted.total > 40


def test_4_bits_are_packed_before_the_next_weight_is_read(llava_folder: Path, counted: type[Counted]) -> None:
    """transformers would otherwise have all of them there in 16 bits, on the card, before the first is packed."""
    model = load(recipe_for(llava_folder, bits=4), None)
    gc.collect()
    kept = sum(1 for parameter in model.parameters() if compat.packed_weights(parameter) is None)
    assert counted.total > 40 and counted.most <= kept + 2


def test_a_tower_that_stays_on_disk_takes_nothing_of_the_card(llava_folder: Path, tower_reads: list[str]) -> None:
    recipe = recipe_for(llava_folder)
    base = load_processing(recipe.model, "pad").base
    stand_ins = tower_stand_ins(gather(base), torch.float32, CARD)
    assert {(each.device, each.untyped_storage().nbytes()) for each in stand_ins.values()} == {(CARD, 4)}
    model = load(recipe, CARD, leave_tower=True)
    assert not list(model.model.vision_tower.parameters()) and tower_reads == []
