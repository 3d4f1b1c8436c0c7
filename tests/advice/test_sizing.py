"""What is proposed fits the card by the plan that `llava-accel plan` makes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.runs import PARITY, mixed_records, write_records
from helpers.traces import trace_once
from llava_accel.advice import sizing
from llava_accel.advice.sizing import Card, Fit, find_card, size
from llava_accel.advice.stand_in import load_configs
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.exceptions import UserError
from llava_accel.model.processing import Processing
from llava_accel.recipe import make_recipe
from llava_accel.setup.datasets import build_encoder
from llava_accel.sources.named import Named


@pytest.fixture(scope="module")
def processing(llava_folder: Path) -> Processing:
    return load_configs(str(llava_folder))


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace for all cards: it is of the same rows."""
    monkeypatch.setattr(sizing, "trace_step", trace_once)


def fit(folder: Path, processing: Processing, gigabytes: float, most: int = 64, is_gpu: bool = True) -> Fit:
    path = write_records(folder / "data.json", mixed_records(12))
    tables = {
        "run": {"name": "r"},
        "model": {"base": str(processing.base.folder)},
        "data": {"train": str(path), "images": str(PARITY / "images")},
    }
    sources = open_sources([Named(str(path), str(PARITY / "images"))], folder / "cache")
    corpus = Corpus(sources, build_encoder(make_recipe(tables), processing))
    lengths = np.array([corpus.encode(row).length for row in range(len(corpus))])
    return size(tables, processing, corpus, [np.argsort(-lengths)], Card(gigabytes, "a card", is_gpu), most)


def test_a_card_that_holds_all_saves_nothing(tmp_path: Path, processing: Processing) -> None:
    found = fit(tmp_path, processing, 24.0)
    assert (found.bits, found.checkpoints, found.batch) == (16, False, 64) and 0 < found.gigabytes < 24
    assert fit(tmp_path, processing, 24.0, most=16).batch == 16


def test_a_smaller_card_checkpoints_then_quantises_then_takes_less(
    tmp_path: Path, processing: Processing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On cards from almost nothing upwards, and with the share of the driver left out of the account."""
    monkeypatch.setattr("llava_accel.estimate.peak_memory.CONTEXT_BYTES", 0)
    found: list[tuple[int, bool, int]] = []
    for gigabytes in np.geomspace(0.005, 0.2, 24):
        try:
            one = fit(tmp_path, processing, float(gigabytes))
        except UserError:
            assert not found, "what fits a card fits a larger one"
            continue
        assert one.gigabytes <= gigabytes
        found.append((one.bits, not one.checkpoints, one.batch))
    ways = [way[:2] for way in found]
    assert ways == sorted(ways), "16 bits before 4, and checkpointing before both"
    assert {(4, False), (16, False), (16, True)} <= {*ways}


def test_what_fits_no_card_is_refused_with_what_to_name(tmp_path: Path, processing: Processing) -> None:
    with pytest.raises(
        UserError, match=r"a card: too small for this base.*with --gpu GB, or a smaller base with --base"
    ):
        fit(tmp_path, processing, 0.5)
    with pytest.raises(UserError, match="such as --gpu 24"):
        fit(tmp_path, processing, 0.5, is_gpu=False)


def test_a_step_is_traced_once_for_both_numbers_of_bits(
    tmp_path: Path, processing: Processing, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[bool] = []

    def noting(recipe: object, *rest: object) -> object:
        traced.append(recipe.model.gradient_checkpointing)  # pyright: ignore[reportAttributeAccessIssue]
        return trace_once(recipe, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(sizing, "trace_step", noting)
    fit(tmp_path, processing, 24.0)
    assert traced == [True, False]


def test_without_a_gpu_the_memory_of_the_machine_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_card(24.0) == Card(24.0, "a GPU of 24 GB")
    monkeypatch.setattr(sizing, "find_device", lambda: torch.device("cpu"))
    card = find_card(None)
    assert not card.is_gpu and card.gigabytes > 0 and "as there is no GPU" in card.name
