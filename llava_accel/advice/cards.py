"""The largest micro-batch of a recipe that cards of usual sizes hold: computed, for rows with the largest image."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from transformers import PreTrainedTokenizerBase

from llava_accel.advice.stand_in import with_known_base
from llava_accel.console.output import Console, counted
from llava_accel.data.loader import tensor
from llava_accel.data.tiling import Tiling
from llava_accel.estimate.answers import answered_at_once, plan_answers, trace_evaluation
from llava_accel.estimate.peak_memory import count_weights, layouts, plan_for
from llava_accel.estimate.trace import build_meta
from llava_accel.estimate.worst_case import num_tiles, planned_dtype, trace_worst, worst_batches
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.datasets import Part, open_data

CARDS = (16, 24, 48, 80)
"""GB, of 10^9 bytes."""
_ROWS = 2  # rows that are traced; memory grows linearly with them
_QUESTION, _ANSWER = 96, 32
"""Tokens of the text beside the image."""
_WORDS = "what is the colour of the shape on the left and how many are there".split()


@dataclass(frozen=True, slots=True)
class Cards:
    """The largest micro-batches, and the rows that they were computed for."""

    assumed: str
    """What is assumed about the base; empty where its own configs are here."""
    dtype: str
    num_tokens: int
    """Tokens of a row."""
    num_tiles: int
    """Tiles of its image."""
    batches: dict[str, tuple[int, ...]]
    """Name of a layout -> the largest micro-batch on each of `CARDS`; 0 where none fits, or no evaluation does."""


def largest_batches(recipe: Recipe, ranks: int) -> Cards:
    """Plan the recipe for each card.

    Raises:
        UserError: the base cannot be used.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "base").mkdir()
        known, assumed = with_known_base(recipe, folder / "base", always=True)
        processing = load_processing(known.model, known.data.image_aspect)
        asked = _with_rows(known, processing, folder)
        run = RunContext(asked, build_accelerator(asked), Console(False))
        training, held_out = open_data(run, processing)
        return _plan(asked, processing, training, held_out, ranks, assumed)


def _plan(
    recipe: Recipe, processing: Processing, training: Part, held_out: Part | None, ranks: int, assumed: str
) -> Cards:
    dtype = planned_dtype(recipe.run.precision, True)
    weights = count_weights(build_meta(recipe, processing, dtype), recipe)
    batch, moments = trace_worst(recipe, processing, worst_batches(recipe, training), dtype)
    largest: dict[str, tuple[int, ...]] = {}
    answers = trace_evaluation(recipe, processing, held_out, dtype) if held_out else {}
    for layout in layouts(ranks):
        planned = plan_for(layout, weights, recipe, moments[layout.divides_weights])
        asked = plan_answers(planned, answers[layout.divides_weights]) if held_out else None
        largest[layout.name] = tuple(
            planned.largest_batch(card * 1e9, _ROWS) if not asked or answered_at_once(asked, card * 1e9, recipe) else 0
            for card in CARDS
        )
    tokens = int(tensor(batch, "input_ids").shape[1])
    return Cards(assumed, str(dtype).removeprefix("torch."), tokens, num_tiles(batch) // _ROWS, largest)


def _with_rows(recipe: Recipe, processing: Processing, folder: Path) -> Recipe:
    """The recipe with made-up records: each has the largest image that its rows hold, and a usual amount of text."""
    tiling, records = processing.tiling, list[dict[str, object]]()
    question, answer = (_text(processing.processor.tokenizer, number) for number in (_QUESTION, _ANSWER))
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    for size in largest_images(tiling, recipe.data.max_length - 2 * (_QUESTION + _ANSWER)):
        for _ in range(_ROWS):
            name = f"{len(records)}.png"
            Image.new("RGB", size).save(folder / name)
            records.append({"id": name, "image": name, "conversations": turns, "rejected": f"no {answer}"})
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    evaluates = bool(recipe.data.eval or recipe.data.eval_fraction)
    data = {"train": str(path), "images": str(folder), "eval": str(path) if evaluates else "", "eval_fraction": 0.0}
    data |= {"cache_dir": str(folder / "cache"), "workers": 0, "share_prefix": False, "columns": {}, "reader": ""}
    train = {"per_device_batch_size": _ROWS}
    changes = {
        "data": recipe.data.model_copy(update=data),
        "train": recipe.train.model_copy(update=train),
    }
    return recipe.model_copy(update=changes)


def largest_images(tiling: Tiling, room: int) -> list[tuple[int, int]]:
    """Width and height of the image with most tokens that fit into `room`, and of that with most tiles if it is another."""
    sizes = list(tiling.canvases) or [(tiling.side, tiling.side)]
    views = {size: tiling.views(["image"], lambda _, size=size: size)[0] for size in sizes}
    fitting = [size for size in sizes if views[size].num_tokens <= room] or [
        min(sizes, key=lambda size: views[size].num_tokens)
    ]
    longest = max(fitting, key=lambda size: (views[size].num_tokens, views[size].layout.num_tiles))
    most = max(fitting, key=lambda size: views[size].layout.num_tiles)
    more = views[most].layout.num_tiles > views[longest].layout.num_tiles
    return [longest, most] if more else [longest]


def _text(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> str:
    words = list(_WORDS)
    while len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) < num_tokens:  # pyright: ignore[reportArgumentType]
        words.append(_WORDS[len(words) % len(_WORDS)])
    return " ".join(words)


def show_cards(recipe: Recipe, ranks: int, console: Console) -> None:
    """Print the largest micro-batch of each launch profile on each card."""
    cards = largest_batches(recipe, ranks)
    if cards.assumed:
        console.line(cards.assumed)
    rows = [
        [name if name == "one GPU" else f"{name} x {ranks}", *(f"{number:,}" if number else "-" for number in batches)]
        for name, batches in cards.batches.items()
    ]
    console.line(
        f"computed, not measured: the largest train.per_device_batch_size in {cards.dtype}, of rows of {cards.num_tokens:,} "
        f"tokens with an image of {counted(cards.num_tiles, 'tile')} in each; - where none fits"
    )
    console.table(f"micro-batch of {recipe.run.name}", ["", *(f"{card} GB" for card in CARDS)], rows)
