"""A loss of your own, for `train.objective = "recipes/my_loss.py:Focal"`.

An objective is a class that inherits from `Objective`. What its `loss` returns is a sum, not a mean: it is divided by what
`count` returns, summed over all micro-batches and processes of a step, so that it does not depend on how a batch is split.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llava_accel.model.objective import Objective, cross_entropy


class Focal(Objective):
    """Cross-entropy in which a token counts less, the surer the model is of it: Lin et al. 2017, arXiv:1708.02002."""

    MEASURES = ("cross_entropy",)
    """Further values in log lines; `measured` holds their sums."""

    def loss(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """The sum over a micro-batch.

        Args:
            hidden: [targets, hidden]: the state that each target token is predicted from.
            batch: The fields of `data/collate.py`, such as target_ids and target_weights, [targets] both.
        """
        losses = self.for_each_target(cross_entropy, hidden, batch["target_ids"])
        weighted = losses * batch["target_weights"]
        self.measured = {"cross_entropy": weighted.detach().sum()}
        return ((1 - (-losses).exp()) ** 2 * weighted).sum()
