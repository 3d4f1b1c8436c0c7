"""Records with the id of another of the same file: not an error, but reports and predictions name records by their ids."""

import numpy as np

from llava_accel.data.corpus import Corpus
from llava_accel.data.survey import Survey
from llava_accel.sources.problems import DataError


def repeated_ids(corpus: Corpus, survey: Survey) -> dict[int, int]:
    """Usable row -> the first usable row of the same file with its id, for all but these first ones."""
    repeated: dict[int, int] = {}
    usable = survey.usable
    for one in corpus.ranges:
        rows = usable[slice(*np.searchsorted(usable, (one.start, one.stop)))]
        _, first, numbers = np.unique(survey.id_keys[rows], return_index=True, return_inverse=True)
        (again,) = np.nonzero(first[numbers] != np.arange(len(rows)))
        repeated.update(zip(rows[again].tolist(), rows[first[numbers[again]]].tolist(), strict=True))
    return repeated


def repeated_id(corpus: Corpus, row: int, first: int) -> DataError:
    """The message about such a record, as an error with file and row."""
    error = DataError(
        "duplicate_id",
        f"row {corpus.file_and_row(first)[1]} has the same id",
        "Give each record its own id, as --fix does: reports and predictions name records by their ids",
    )
    return corpus.locate(error, row)
