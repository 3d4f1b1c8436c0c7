"""The loss and measures of the objective itself on held-out data, where it is not the cross-entropy of the answers."""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from llava_accel.model.objective import Objective
from llava_accel.model.preference import Preference
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import whole_root
from llava_accel.scoring.metrics import PAIR, Prediction, images_of, intervals, mean_of
from llava_accel.setup.datasets import Part
from llava_accel.setup.micro_batches import load


def objective_scores(
    run: RunContext, objective: Objective, part: Part, batches: Sequence[list[int]], predictions: Sequence[Prediction]
) -> dict[str, float]:
    """The loss, and what the objective measures besides; every rank must call it.

    Args:
        batches: Rows of the corpus that this rank computes; ranks have the same number of batches.
        predictions: One for each of these rows on all ranks, in the order of the data. Those of pairs get their `PAIR`.
    """
    accelerator, width = run.accelerator, len(objective.MEASURES)
    losses = counts = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    measured = losses.new_zeros(width)
    of_pairs: list[tuple[int, float]] = []
    windows = load(run, part, [[batch] for batch in batches], skips=False)
    with whole_root(objective):
        for batch, (loaded,) in zip(batches, windows, strict=True):
            losses = losses + objective(**loaded).double()
            counts = counts + objective.count(loaded).double()
            if width:
                measured = measured + torch.stack([objective.measured[name] for name in objective.MEASURES]).double()
            if isinstance(objective, Preference):
                of_pairs += zip(batch, objective.margins.tolist(), strict=True)
    sums = torch.cat([losses.view(-1), counts.view(-1), measured.view(-1)])
    total = accelerator.reduce(sums, reduction="sum")
    assert isinstance(total, Tensor)
    terms = counts.numel()
    loss, number = total[:terms], total[terms : 2 * terms]
    metrics = {"loss": float((loss / number).sum())}
    metrics |= dict(zip(objective.MEASURES, (total[2 * terms :] / number[0]).tolist(), strict=True))
    if not isinstance(objective, Preference):
        return metrics
    gathered: list[tuple[int, float]] = gather_object(of_pairs) if accelerator.num_processes > 1 else of_pairs
    return metrics | _into_rows([margin for _, margin in sorted(gathered)], predictions)


def _into_rows(margins: Sequence[float], predictions: Sequence[Prediction]) -> dict[str, float]:
    """Put the `PAIR` of each pair into its prediction; returns the 95 % interval of the share of pairs that are right."""
    accuracies = [float(np.sign(margin) + 1) / 2 for margin in margins]
    for row, accuracy, margin in zip(predictions, accuracies, margins, strict=True):
        row |= dict(zip(PAIR, (accuracy, margin), strict=True))
    scored = mean_of(accuracies)
    return intervals({PAIR[0]: scored}, images_of(predictions)) if scored else {}
