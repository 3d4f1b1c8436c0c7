"""Finds records that a run has shown to be worth a look: their labels may be wrong, or contradict those of others."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus
from llava_accel.data.nearest import nearest
from llava_accel.data.records import described
from llava_accel.data.survey import Survey, text_key
from llava_accel.scoring.contradictions import contradictions
from llava_accel.scoring.held_out import FILE as TRAINING
from llava_accel.scoring.metrics import PAIR, Prediction, hardness
from llava_accel.setup.datasets import Part
from llava_accel.storage.jsonl import read_json_lines, write_json_lines

HARMFUL = "harmful.jsonl"
"""File in the folder of predictions."""
WRONG, HARD, CONTRADICTED = "answered wrong", "highest loss", "contradicts another record"
_MOST_WRONG, _MOST_NEAR = 100, 3
_LEAST_HARD, _SHARE_HARD = 12, 0.05
_THREADS, _AT_ONCE = 16, 256  # on a network disk each file waits for an answer
_MOST_SAME_ID = 100  # records that are looked through for the one that was answered

Line = dict[str, Any]
"""One record: why it is named, its file and row, its question and answer, and what speaks against it."""
Facts = tuple[str, str, str]
"""Id, image and question: they identify a record where rows may have moved."""


class Records(NamedTuple):
    """Usable rows of data.train or data.eval."""

    corpus: Corpus
    survey: Survey
    rows: Int[np.ndarray, "rows"]


def harmful(
    training: Records, held_out: Records | None, answered: Sequence[Prediction], trained: Sequence[Prediction]
) -> tuple[list[tuple[int, Line]], int]:
    """Rows and lines on held-out records that were answered wrong and on training records with the highest loss, in the
    order of their losses, and on training records that contradict another one.

    Args:
        answered: The held-out answers of a run.
        trained: Its answers to training records after the last step.

    Returns:
        Rows with their lines, and how many answers belong to records that are gone, or that have another answer now.
    """
    # For a pair, its preference counts: what the model generates is rarely one of its answers.
    wrong = [row for row in answered if row.get(PAIR[0], row.get("score")) == 0]
    hard = sorted(trained, key=_hardness, reverse=True)[: max(_LEAST_HARD, round(_SHARE_HARD * len(trained)))]
    lines: list[tuple[int, Line]] = []
    num_lost = 0
    chosen = [(sorted(wrong, key=_hardness, reverse=True)[:_MOST_WRONG], WRONG, held_out), (hard, HARD, training)]
    for predictions, why, records in chosen:
        places = _rows_of(predictions, records) if records else {}
        num_lost += len(predictions) - len(places)
        for number, row in places.items():
            shown = {
                key: predictions[number][key] for key in ("prediction", "loss", PAIR[1]) if key in predictions[number]
            }
            lines.append((row, _line(records.corpus, row, why) | shown))  # pyright: ignore[reportOptionalMemberAccess]
    for row, other in contradictions(*training).items():
        lines.append((row, _line(training.corpus, row, CONTRADICTED) | {"other": _line(training.corpus, other)}))
    return lines, num_lost


def write_harmful(folder: Path, step: int, training: Part, held_out: Part | None, console: Console) -> list[Line]:
    """Write the lines of a run into its folder, each wrong answer with the nearest images of the training data, where
    their features are kept, and return them.

    Raises:
        DataError: a record or an image was changed since the run began.
    """
    answered, trained = (_read(folder / "predictions" / name) for name in (f"step-{step:06d}.jsonl", TRAINING))
    sides = [Records(part.corpus, part.survey, part.rows) if part else None for part in (training, held_out)]
    assert sides[0] is not None
    numbered, _ = harmful(sides[0], sides[1], answered, trained)
    if held_out and training.image_reader.store:
        _add_nearest({row: line for row, line in numbered if line["why"] == WRONG}, training, held_out, console)
    lines = [line for _, line in numbered]
    if lines:
        write_json_lines(lines, folder / "predictions" / HARMFUL)
    return lines


def facts(row: Mapping[str, Any]) -> Facts:
    """The facts that identify the record of a line or of a prediction."""
    return str(row["id"]), str(row["image"]), str(row["question"])


def counts_of(lines: Sequence[Line]) -> str:
    """How many there are of each kind: "3 answered wrong, 12 highest loss"."""
    return ", ".join(f"{number:,} {why}" for why, number in Counter(line["why"] for line in lines).items())


def _hardness(row: Prediction) -> float:
    return hardness(row) or 0.0


def _read(path: Path) -> list[Prediction]:
    return read_json_lines(path) if path.is_file() else []


def _line(corpus: Corpus, row: int, why: str = "") -> Line:
    file, number = corpus.file_and_row(row)
    known = described(corpus.record(row))
    answer = max(known["answers"], key=known["answers"].get)
    named = {"file": file, "row": number, "id": known["id"], "image": known["image"], "question": known["question"]}
    return ({"why": why} if why else {}) | named | {"answer": answer}


def _rows_of(predictions: Sequence[Prediction], records: Records) -> dict[int, int]:
    """Number of a prediction -> the row of its record, where it is still there with the same answers."""
    corpus, survey, rows = records
    rows = rows[np.argsort(survey.id_keys[rows], kind="stable")]
    keys = survey.id_keys[rows]
    row_of: dict[int, int] = {}
    for number, prediction in enumerate(predictions):
        start, end = (np.searchsorted(keys, text_key(str(prediction["id"])), side) for side in ("left", "right"))
        for row in rows[start : min(end, start + _MOST_SAME_ID)].tolist():
            known = described(corpus.record(row))
            if facts(known) == facts(prediction) and known["answers"] == prediction.get("answers"):
                row_of[number] = row
                break
    return row_of


def _add_nearest(wrong: Mapping[int, Line], training: Part, held_out: Part, console: Console) -> None:
    """Put the nearest images of the training data into lines on held-out records, each with a record that shows it, if
    possible one that asks the same."""
    corpus, survey = training.corpus, training.survey
    asked = dict(_means(held_out, list(wrong)))
    shown = training.rows[survey.image_keys[training.rows] != 0]
    keys = survey.image_keys[shown]
    different = shown[np.sort(np.unique(keys, return_index=True)[1])].tolist() if asked else []
    with console.bar("nearest images", len(different)) as bar:
        near = nearest(list(asked.values()), _means(training, different, bar.advance), _MOST_NEAR)
    for row, each in zip(asked, near, strict=True):
        line = wrong[row]
        line["nearest"] = []
        for near_row, similarity in each:
            rows = shown[keys == survey.image_keys[near_row]]
            best = int(rows[np.argmax(survey.question_keys[rows] == held_out.survey.question_keys[row])])
            line["nearest"].append(_line(corpus, best) | {"similarity": round(similarity, 4)})


def _means(
    part: Part, rows: Sequence[int], progress: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[int, Float[Tensor, " channels"]]]:
    """Rows whose features are stored, each with the mean over all tokens of its images. Each image file is read once, as
    features are stored by content."""
    reader, corpus = part.image_reader, part.corpus
    assert reader.store
    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            for row, names in zip(some, threads.map(reader.feature_names, map(corpus.image_files, some)), strict=True):
                known = [mean for name in names if (mean := reader.store.mean(name)) is not None]
                if known:
                    yield row, torch.stack(known).mean(0)
            progress(len(some))
