"""The figures of a run's data: for its first lines, its log and its report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_accel.data.sampler import Order
from llava_accel.recipe import Recipe
from llava_accel.setup.datasets import Part, common_answers
from llava_accel.setup.vision_cache import count_images
from llava_accel.storage.atomic import atomic_file

FIGURES = "data.json"
_COMMON = 5  # answers
_LONGEST = 80  # characters of one
_BINS = 24


class Mix(NamedTuple):
    """The sources of data.train, and to which of them every row belongs."""

    names: list[str]
    """Names of the entries of data.train: each once, without its folder where that leaves them distinct."""
    starts: list[int]
    """The first row of every file."""
    of_file: list[int]
    """The entry that every file belongs to: a folder holds several."""

    def share_out(self, rows: np.ndarray, weights: Sequence[float] = ()) -> np.ndarray:
        """How many of these rows each entry has: [entries].

        Args:
            weights: How much a row of each file counts; by default 1.
        """
        files = np.searchsorted(self.starts, rows, side="right") - 1
        counts = np.bincount(files, minlength=len(self.starts)) * (np.asarray(weights) if weights else 1)
        return np.bincount(self.of_file, weights=counts, minlength=len(self.names))


def source_mix(part: Part) -> Mix:
    """The sources of the training data."""
    owners = [source.name for source in part.corpus.sources]
    known = list(dict.fromkeys(owners))
    short = [Path(one).name for one in known]
    names = short if len(set(short)) == len(short) else known
    lengths = list(map(len, part.corpus.sources))
    return Mix(names, [0, *np.cumsum(lengths)[:-1].tolist()], [known.index(owner) for owner in owners])


def figures_of(recipe: Recipe, training: Part, held_out: Part | None, order: Order) -> dict[str, Any]:
    """Records, images, turns, lengths and commonest answers of both parts, and what an epoch takes of each source."""
    mix, rows = source_mix(training), training.rows
    records = mix.share_out(rows)
    examples = mix.share_out(rows, [source.weight for source in training.corpus.sources])
    return {
        "train": _part(training),
        "eval": None if held_out is None else _part(held_out),
        "sources": [
            {"name": name, "records": round(count), "examples": number, "share": number / order.examples_per_epoch}
            for name, count, number in zip(mix.names, records.tolist(), examples.tolist(), strict=True)
        ],
    }


def write_figures(folder: Path, figures: dict[str, Any]) -> None:
    """Write the figures into the run folder."""
    with atomic_file(folder / FIGURES) as unfinished:
        unfinished.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _part(part: Part) -> dict[str, Any]:
    survey, rows = part.survey, part.rows
    lengths, images = survey.lengths[rows], survey.num_images[rows]
    counts, edges = np.histogram(lengths, bins=min(_BINS, max(1, np.count_nonzero(np.bincount(lengths)))))
    return {
        "records": len(rows),
        "left_out": len(survey.errors),
        "images": count_images([part]),
        "without_image": int(np.count_nonzero(images == 0)),
        "turns": _spread(survey.num_turns[rows]),
        "tokens": _spread(lengths),
        "targets": _spread(survey.num_targets[rows]),
        "lengths": {"edges": edges.tolist(), "counts": counts.tolist()},
        "common_answers": _common_answers(part),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    middle, high = np.percentile(values, (50, 95))
    mean, most, total = values.mean(), values.max(), values.sum(dtype=np.int64)
    return {"mean": float(mean), "median": float(middle), "p95": float(high), "max": int(most), "total": int(total)}


def _common_answers(part: Part) -> list[dict[str, Any]]:
    """The answers that most records end in, without those that occur only once."""
    _, counted = common_answers(part.corpus, part.survey, part.rows, _COMMON)
    return [
        {
            "answer": text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…",
            "records": count,
            "share": count / len(part),
        }
        for text, count in counted
        if count > 1
    ]
