"""Whether the evaluation asks what training has shown: the same images, whatever their names, and the same questions."""

import numpy as np
from jaxtyping import Int

from llava_accel.inspection.data_facts import Checked


def overlap(
    training: Checked, rows: Int[np.ndarray, "train"], evaluation: Checked, eval_rows: Int[np.ndarray, "eval"]
) -> list[str]:
    """Lines on what evaluation and training share; none if they share nothing.

    Args:
        rows, eval_rows: Usable rows of training and of evaluation; both may be of one corpus.
    """
    if not len(rows) or not len(eval_rows):
        return []
    places, contents = _shown(training, rows)
    eval_places, eval_contents = _shown(evaluation, eval_rows)
    questions, eval_questions = training.survey.question_keys[rows], evaluation.survey.question_keys[eval_rows]
    asked = np.isin(eval_questions, questions)
    known = np.isin(eval_contents, contents)
    both = np.isin(_paired(eval_contents, eval_questions[eval_places]), _paired(contents, questions[places]))
    of_images, of_both = np.unique(eval_places[known]), np.unique(eval_places[both])
    said: list[str] = []
    if len(of_images):
        row = int(eval_rows[of_images[0]])
        match = int(rows[places[contents == eval_contents[known][0]][0]])
        said.append(
            f"{len(of_images):,} of {len(eval_rows):,} evaluation records show an image that training shows too, "
            f"whatever its name ({len(of_both):,} with the same question), such as {evaluation.corpus.place(row)}, whose "
            f"image is that of {training.corpus.place(match)}. Remove them from one of the two: scores on them say "
            "nothing about new images"
        )
    if asked.any():
        said.append(
            f"{int(asked.sum()):,} of {len(eval_rows):,} evaluation records have the question of a training record, "
            "word for word, on whatever image"
        )
    return said


def _paired(one: Int[np.ndarray, "n"], other: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """A key for each pair of keys; numbers that are too large wrap around."""
    return one * np.int64(0x9E3779B97F4A7C1) + other


def _shown(checked: Checked, rows: Int[np.ndarray, "rows"]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """A place in `rows` and a content key, for every image that these rows show."""
    contents = checked.survey.contents
    contents = contents[np.argsort(contents[:, 0], kind="stable")]
    keys = checked.survey.image_keys[rows]
    starts = np.searchsorted(contents[:, 0], keys, side="left")
    counts = np.searchsorted(contents[:, 0], keys, side="right") - starts
    places = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, contents[np.repeat(starts, counts) + within, 1]
