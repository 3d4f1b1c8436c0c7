"""Preference tuning: makes the chosen one of two answers to a question likelier than the rejected one, measured against
the model before training (Rafailov et al. 2023, arXiv:2305.18290).

Both answers follow one prompt with one image in the same row, so a pair costs little more than an answer. Their
log-probabilities before training are computed once (`setup/reference.py`) and come with the batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llava_accel.model.objective import Objective, cross_entropy
from llava_accel.recipe.tables import PreferenceTable


class Preference(Objective):
    """The objective of train.objective = "dpo".

    Its loss has two terms: one over pairs, divided by their number, and one over the chosen answers' tokens, divided by
    theirs.
    """

    MEASURES = (
        "pair_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "chosen_log_prob", "rejected_log_prob", "kl",
    )  # fmt: skip
    """Means over pairs. A reward is beta x the gain in an answer's log-probability. "kl" is the mean gain per token over
    both answers: the divergence from the reference, estimated on the data's answers."""
    table = PreferenceTable()
    """The recipe's [preference], set by `model/task.py`."""
    margins: Float[Tensor, "pairs"] = torch.zeros(0)
    """By how much the chosen answer of each pair of the last micro-batch has gained more than the rejected one, x beta."""

    def count(self, batch: Mapping[str, Any]) -> Float[Tensor, "terms"]:
        is_chosen = batch["target_examples"] % 2 == 0
        pairs = batch["target_weights"].new_full((), len(batch["reference"]) / 2)  # filled on the device: a copy waits
        return torch.stack([pairs, is_chosen.sum()])

    def loss(self, hidden: Float[Tensor, "targets hidden"], batch: Mapping[str, Any]) -> Float[Tensor, "terms"]:
        reference, owners = batch["reference"], batch["target_examples"]
        log_probs = self.answer_log_probs(hidden, batch["target_ids"], owners, len(reference))
        lengths = torch.zeros_like(reference).index_add(0, owners, torch.ones_like(batch["target_weights"]))
        gained = log_probs - reference
        self.measured = self._measured(log_probs.detach(), gained.detach(), lengths)
        pairs = pair_losses(_pairs(gained), _pairs(lengths), self.table).sum()
        return torch.stack([pairs, -self.table.sft_weight * log_probs[0::2].sum()])

    def answer_log_probs(
        self,
        hidden: Float[Tensor, "targets hidden"],
        ids: Int[Tensor, "targets"],
        owners: Int[Tensor, "targets"],
        number: int,
    ) -> Float[Tensor, "examples"]:
        """Log-probability of each example's answer: the sum over its tokens."""
        losses = self.for_each_target(cross_entropy, hidden, ids)
        return -losses.new_zeros(number).index_add(0, owners, losses)

    def _measured(
        self,
        log_probs: Float[Tensor, "examples"],
        gained: Float[Tensor, "examples"],
        lengths: Float[Tensor, "examples"],
    ) -> dict[str, Float[Tensor, ""]]:
        chosen, rejected = _pairs(self.table.beta * gained).unbind(-1)
        self.margins = chosen - rejected
        sums = (
            (self.margins.sign() + 1) / 2, self.margins, chosen, rejected, log_probs[0::2], log_probs[1::2],
            _pairs(gained / lengths.clamp(min=1)).mean(-1),
        )  # fmt: skip
        return {name: each.sum() for name, each in zip(self.MEASURES, sums, strict=True)}


def pair_losses(
    gained: Float[Tensor, "pairs 2"], lengths: Float[Tensor, "pairs 2"], table: PreferenceTable
) -> Float[Tensor, "pairs"]:
    """The loss of each pair, without the term for the chosen answer alone (`sft_weight`).

    Args:
        gained: By how much the log-probability of the chosen and of the rejected answer has grown since before training.
        lengths: Tokens of these answers.
    """
    (chosen, rejected), smoothing = gained.unbind(-1), table.label_smoothing
    margin = table.beta * (chosen - rejected)
    right, wrong = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    if table.loss == "sigmoid":
        losses = (1 - smoothing) * right + smoothing * wrong
    elif table.loss == "robust":  # Chowdhury et al. 2024, arXiv:2403.00409
        losses = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    elif table.loss == "hinge":  # Zhao et al. 2023, arXiv:2305.10425
        losses = F.relu(1 - margin)
    else:  # Azar et al. 2023, arXiv:2310.12036, whose figures come from log-probabilities per token
        a_token = gained / lengths
        losses = (a_token[:, 0] - a_token[:, 1] - 1 / (2 * table.beta)) ** 2
    # BCO without its moving mean of rewards, as MPO is trained elsewhere too: Wang et al. 2024, arXiv:2411.10442.
    apart = -F.logsigmoid(table.beta * chosen) - F.logsigmoid(-table.beta * rejected)
    return table.loss_weight * losses + table.bco_weight * apart


def _pairs(values: Float[Tensor, "examples"]) -> Float[Tensor, "pairs 2"]:
    return values.unflatten(0, (len(values) // 2, 2))
