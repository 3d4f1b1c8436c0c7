"""Every file of a base in each layout, spoilt in every way: one message with a remedy, in `check` and in `train` alike.

What is not refused must train. The cases run in this process, so none may hang, fill the memory or end it. A share of
them is tried, another one for each file and each key; SPOILT=all in the environment tries all 5,000, in half an hour.
"""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from helpers.spoilt_bases import LAYOUTS, WEIGHTS, Spoil, fields, make_bases, model_of, text_files, whole
from helpers.verbs import assert_helpful
from llava_accel.console.output import Console, printable
from llava_accel.exceptions import UserError
from llava_accel.inspection.preflight import examine_model
from llava_accel.model.build import load_model
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.setup.datasets import build_encoder

FILES = [(layout, name) for layout, names in LAYOUTS.items() for name in names]
LONGEST = 10.0  # seconds; all but a few bombs take a tenth of one


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("bases"))


def recipe_of(layout: Path, template: str) -> Recipe:
    lora = {"rank": 4, "alpha": 8}
    model = model_of(layout) | {"template": template, "lora": lora}
    return make_recipe({"run": {"name": "t"}, "model": model, "data": {"train": "x.json"}})


def check(recipe: Recipe) -> list[str]:
    processing, messages = examine_model(recipe, Console(False))
    try:
        if processing and not messages:
            build_encoder(recipe, processing)
    except UserError as error:
        messages.append(str(error))
    return messages


def train(recipe: Recipe) -> str:
    """What a run says before its first step, "" if it takes it."""
    try:
        processing = load_processing(recipe.model, recipe.data.image_aspect)
        build_encoder(recipe, processing)
        model = load_model(recipe, processing, dtype=torch.float32, device=None).model.train()
    except UserError as error:
        return str(error)
    image = [processing.image_token_id] * processing.tiling.tile_tokens
    ids = torch.tensor([[1, *image, *(token % processing.vocab_size for token in (5, 9, 40, 41))]])
    pixels = torch.rand(1, 3, 56, 56)
    labels = ids.masked_fill(ids == processing.image_token_id, -100)
    loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    return ""


def assert_ends_well(layout: Path, place: Path, spoil: Spoil, to: Path, template: str = "v1") -> None:
    shutil.copytree(layout, to)
    spoil(to / place)
    recipe, start = recipe_of(to, template), time.monotonic()
    messages = check(recipe)
    for message in messages:
        assert_helpful(printable(message), [])
    # One missing part may show in two places: a default of transformers fits neither weights nor image processor.
    assert len(messages) <= 2, messages
    refused = train(recipe)
    assert bool(refused) == bool(messages), refused or messages
    assert not refused or refused in messages, (refused, messages)
    assert time.monotonic() - start < LONGEST
    shutil.rmtree(to)


def share(cases: Iterable[tuple[str, Spoil]], of: int, first: int) -> dict[str, Spoil]:
    """One of `of` cases, or all where the environment asks for them."""
    every = list(cases)
    return dict(every if os.environ.get("SPOILT") == "all" else every[first % of :: of])


def try_all(layout: Path, place: str, cases: dict[str, Spoil], to: Path) -> None:
    """Try all cases before any failure is reported, each with its name."""
    failed = []
    for name, spoil in cases.items():
        try:
            template = "auto" if place.endswith(".jinja") else "v1"
            assert_ends_well(layout, Path(place), spoil, to, template)
        except Exception as error:
            shutil.rmtree(to)
            failed.append(f"{place}: {name}: {type(error).__name__}: {str(error)[:300]}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(("layout", "file"), FILES)
def test_broken_input_a_file_of_a_base(bases: dict[str, Path], tmp_path: Path, layout: str, file: str) -> None:
    try_all(bases[layout], file, share(whole().items(), 5, FILES.index((layout, file))), tmp_path / "copy")


@pytest.mark.parametrize(("layout", "file"), [each for each in FILES if each[1].endswith(".json")])
def test_broken_input_a_key_of_a_base(bases: dict[str, Path], tmp_path: Path, layout: str, file: str) -> None:
    chosen = share(fields(bases[layout] / file), 97, FILES.index((layout, file)))
    assert chosen
    try_all(bases[layout], file, chosen, tmp_path / "copy")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_broken_input_the_weights_of_a_base(bases: dict[str, Path], tmp_path: Path, layout: str) -> None:
    try_all(bases[layout], "base", share(WEIGHTS.items(), 3, list(LAYOUTS).index(layout)), tmp_path / "copy")


def test_the_files_are_all_that_the_bases_have(bases: dict[str, Path]) -> None:
    assert {layout: [str(file) for file in text_files(folder)] for layout, folder in bases.items()} == LAYOUTS


def test_whole_bases_pass(bases: dict[str, Path], tmp_path: Path) -> None:
    for name, layout in bases.items():
        recipe = recipe_of(layout, "v1")
        assert (check(recipe), train(recipe)) == ([], ""), name
