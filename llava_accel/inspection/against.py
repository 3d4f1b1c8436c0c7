"""Lists the records of a recipe that an earlier run shows to be worth a look, and says what to do with them."""

from pathlib import Path

from llava_accel.exceptions import UserError
from llava_accel.pages.history import Prediction, read_run
from llava_accel.scoring.harmful import WRONG, Line, Records, counts_of, facts, harmful
from llava_accel.scoring.metrics import PAIR

_ADVICE = (
    "look at each image beside its answer. Where the answer is wrong, correct it in that file and row, or remove the "
    "record; of two that contradict each other at least one is wrong. Where a held-out answer is right, the nearest "
    "training images may be labelled wrong, or there are too few like it. Then train again"
)


def lines_to_mend(run: Path, training: Records, held_out: Records) -> tuple[list[Line], list[str]]:
    """The lines of `scoring.harmful` for the data as they are now, and remarks on them.

    Raises:
        UserError: `run` is not a run, or its answers are damaged.
    """
    history = read_run(run)
    chosen = history.chosen or history.before
    answered = [_checked(row, run) for row in (history.predictions(chosen["step"]) if chosen else [])]
    trained = [_checked(row, run) for row in history.training_predictions]
    numbered, num_lost = harmful(training, held_out, answered, trained)
    lines = [line for _, line in numbered]
    near = {facts(_checked(line, run)): line["nearest"] for line in history.harmful if "nearest" in line}
    for line in lines:
        if line["why"] == WRONG and facts(line) in near:
            line["nearest"] = near[facts(line)]
    remarks = [f"{counts_of(lines)}. {_ADVICE[:1].upper()}{_ADVICE[1:]}" if lines else "no record is worth a look"]
    if num_lost:
        remarks.append(f"no longer in these data, or with another answer now: {num_lost:,} more")
    if not trained:
        remarks.append(
            "the run has not answered training records (eval.train_limit, after its last step): none has a loss"
        )
    if any(line["why"] == WRONG for line in lines) and not near:
        remarks.append("the run has kept no features (data.cache_features): no nearest training images are named")
    return lines, remarks


def _checked(row: Prediction, run: Path) -> Prediction:
    """UserError if a line was not written by a run."""
    if not {"id", "image", "question"} <= row.keys() or not all(
        isinstance(row.get(key, 0.0), int | float) for key in ("loss", PAIR[1])
    ):
        raise UserError(f"{run}/predictions: a line was not written by a run. Name a run folder that nobody has edited")
    return row
