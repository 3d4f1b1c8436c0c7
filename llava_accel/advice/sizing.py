"""Bits, checkpointing and micro-batch that fit a card, from the plan of a step on the longest records."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
from jaxtyping import Int
from numpy import ndarray

from llava_accel.data.corpus import Corpus
from llava_accel.estimate.peak_memory import CONTEXT_BYTES, USABLE, Layout, Plan, count_weights, plan_for
from llava_accel.estimate.trace import Moment, build_meta, highest, trace_step
from llava_accel.estimate.worst_case import load_largest, planned_dtype
from llava_accel.exceptions import UserError
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.runtime.devices import device_name, find_device, total_bytes
from llava_accel.setup.datasets import build_image_reader

_TRACED = 2  # rows; memory grows linearly with them
_WANTED = 4
"""Examples that a card should hold at least: where fewer fit, 4 bits or checkpointing save memory."""
_SHARE = 0.8  # of the largest batch: records to come may be longer, and evaluations need room


@dataclass(frozen=True, slots=True)
class Card:
    """The memory that a run is sized for."""

    gigabytes: float
    name: str
    is_gpu: bool = True


@dataclass(frozen=True, slots=True)
class Fit:
    """The settings that fit a card."""

    bits: int
    checkpoints: bool
    batch: int
    gigabytes: float
    """The memory that they take, by the plan."""


def find_card(gigabytes: float | None) -> Card:
    """The GPU that is named, else the first one here, else this machine's memory."""
    if gigabytes is not None:
        return Card(gigabytes, f"a GPU of {gigabytes:g} GB")
    device = find_device()
    if size := total_bytes(device) / 1e9:
        return Card(size, f"{device_name(device)} ({size:.0f} GB)")
    size = psutil.virtual_memory().total / 1e9
    return Card(size, f"this machine's {size:.0f} GB of memory, as there is no GPU", is_gpu=False)


def size(
    tables: Mapping[str, Mapping[str, Any]],
    processing: Processing,
    corpus: Corpus,
    largest: Sequence[Int[ndarray, "rows"]],
    card: Card,
    most: int,
) -> Fit:
    """The settings that fit the card: 16 bits rather than 4, and no checkpointing, where enough examples fit with that.

    Args:
        tables: Tables of a recipe, without the keys that are chosen here.
        corpus: With the recipe's encoder.
        largest: Rows that may take most memory, the largest first: by tokens, and by tiles.
        most: The largest micro-batch that is useful.

    Raises:
        UserError: nothing fits.
        DataError: an image of the longest rows cannot be read.
    """
    planner = _Planner(tables, processing, corpus, largest, card)
    wanted = min(_WANTED, most)
    bits, planned = 16, planner.plan(16, True)
    if planner.rows(planned) < wanted:
        bits, planned = 4, planner.plan(4, True)
    rows, checkpoints = planner.rows(planned), True
    if not rows:
        raise _too_large(planned, card)
    # Without checkpointing a large model takes many times as much: where few rows fit with it, that is not computed.
    if rows >= wanted * max(1, processing.base.text.num_hidden_layers // 4):
        without = planner.plan(bits, False)
        if planner.rows(without) >= wanted:
            planned, rows, checkpoints = without, planner.rows(without), False
    batch = _power_of_two(min(most, max(1, int(rows * _SHARE))))
    return Fit(bits, checkpoints, batch, _total(planned, batch) / 1e9)


class _Planner:
    """Plans of a step that accumulates, on one card. What a step keeps does not depend on the bits: it is traced once."""

    def __init__(
        self,
        tables: Mapping[str, Mapping[str, Any]],
        processing: Processing,
        corpus: Corpus,
        largest: Sequence[Int[ndarray, "rows"]],
        card: Card,
    ) -> None:
        self._tables, self._processing, self._card = tables, processing, card
        recipe = self._recipe(16, True)
        reader = build_image_reader(recipe.data, processing)
        first = [rows[[number % len(rows) for number in range(_TRACED)]] for rows in largest]
        self._batches = [load_largest(recipe, corpus, reader, [rows]) for rows in first]
        self._dtype = planned_dtype(recipe.run.precision, card.is_gpu)
        self._moments: dict[bool, Sequence[Moment]] = {}

    def plan(self, bits: int, checkpoints: bool) -> Plan:
        """The plan of a step; without moments where weights, gradients and optimizer alone do not fit."""
        recipe = self._recipe(bits, checkpoints)
        weights = count_weights(build_meta(recipe, self._processing, self._dtype), recipe)
        planned = plan_for(Layout("one GPU"), weights, recipe, (), self._card.is_gpu)
        if _least(planned) > self._card.gigabytes * 1e9:
            return planned
        if checkpoints not in self._moments:
            traced = [trace_step(recipe, self._processing, batch, self._dtype, False) for batch in self._batches]
            self._moments[checkpoints] = highest(moment for moments in traced for moment in moments)
        # In the second micro-batch of a window all gradients of the first are there.
        moments = (replace(moment, gradients=planned.gradients) for moment in self._moments[checkpoints])
        return replace(planned, moments=tuple(moments))

    def rows(self, planned: Plan) -> int:
        """How many of the longest rows fit."""
        return planned.largest_batch(self._card.gigabytes * 1e9, _TRACED) if planned.moments else 0

    def _recipe(self, bits: int, checkpoints: bool) -> Recipe:
        model = {**self._tables["model"], "quantization": {"bits": bits}, "gradient_checkpointing": checkpoints}
        train = {**self._tables.get("train", {}), "per_device_batch_size": _TRACED}
        return make_recipe({**self._tables, "model": model, "train": train})


def _least(planned: Plan) -> int:
    return planned.standing + planned.gradients + planned.update


def _total(planned: Plan, batch: int) -> float:
    step = max(moment.by_weights + moment.by_rows * batch / _TRACED for moment in planned.moments)
    return float(planned.standing + max(step, planned.gradients + planned.update))


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def _too_large(planned: Plan, card: Card) -> UserError:
    least = _total(planned, 1) if planned.moments else float(_least(planned))
    needed = math.ceil((least + CONTEXT_BYTES) / USABLE / 1e8) / 10
    flag = "a larger one with --gpu GB" if card.is_gpu else "the GPU that is meant with --gpu GB, such as --gpu 24"
    return UserError(
        f"{card.name}: too small for this base, which takes {'' if planned.moments else 'more than '}{needed:g} GB with "
        f"4 bits, checkpointing and one of the longest records. Name {flag}, or a smaller base with --base"
    )
