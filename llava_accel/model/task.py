"""Which objective a recipe trains: answers, pairs of answers, or a class of the user's own."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llava_accel.exceptions import UserError
from llava_accel.model.objective import Objective
from llava_accel.model.preference import Preference
from llava_accel.own_code import file_of, is_own, load_own, mended_by_user
from llava_accel.recipe import Recipe
from llava_accel.sources.problems import quoted

_KEY = "train.objective"


def objective_class(recipe: Recipe) -> type[Objective]:
    """The class that train.objective names.

    Raises:
        UserError: it is the user's, and cannot be loaded or is not an `Objective`.
    """
    name = recipe.train.objective
    if name == "dpo":
        return Preference
    if not is_own(name):
        return Objective
    own = load_own(_KEY, name)
    if not (isinstance(own, type) and issubclass(own, Objective)):
        raise UserError(
            f"{_KEY} = {name!r} is not a class that inherits from llava_accel.model.objective.Objective. Write "
            "class NAME(Objective), with a `loss` of its own"
        )
    return _checked(name, own)


def _checked(name: str, own: type[Objective]) -> type[Objective]:
    """The class with checks: UserError for results that a step could not use, or would learn nothing from."""

    class Checked(own):
        terms: torch.Size | None = None
        """The shape of the last count."""

        def count(self, batch: Mapping[str, Any]) -> Tensor:
            counted: object = super().count(batch)
            if not isinstance(counted, Tensor):
                raise _wrong(f"count returns {quoted(counted)}", 'Return a tensor, as batch["target_weights"].sum() is')
            self.terms = counted.shape
            return counted

        def loss(self, hidden: Tensor, batch: Mapping[str, Any]) -> Tensor:
            made: object = super().loss(hidden, batch)
            if self.terms is None:  # a step counts first
                self.count(batch)
            if not isinstance(made, Tensor) or made.shape != self.terms:
                what = f"a tensor of {list(made.shape)}" if isinstance(made, Tensor) else quoted(made)
                raise _wrong(f"loss returns {what}", "Return a sum over the micro-batch, of as many terms as count has")
            if torch.is_grad_enabled() and not made.requires_grad:
                raise _wrong(
                    "what loss returns does not depend on the model", "Compute it from `hidden`, with gradients"
                )
            if missing := [each for each in self.MEASURES if not isinstance(self.measured.get(each), Tensor)]:
                raise _wrong(
                    f"loss leaves no sum of {missing[0]!r} in self.measured", "Put one there for all of MEASURES"
                )
            return made

    def _wrong(problem: str, remedy: str) -> UserError:
        return UserError(f"{_KEY}: {name}: {problem}. {remedy}")

    Checked.__name__ = own.__name__  # errors show it
    return Checked


def new_objective(recipe: Recipe, model: nn.Module, vocab_size: int, dtype: torch.dtype) -> Objective:
    """The recipe's objective around a model; see `Objective` for the arguments."""
    table = recipe.model
    kind, name = objective_class(recipe), recipe.train.objective
    with mended_by_user(_KEY, file_of(name), "class") if is_own(name) else nullcontext():
        objective = kind(model, vocab_size, dtype, table.train_vision, table.tower_batch)
    if isinstance(objective, Preference):
        objective.table = recipe.preference
    return objective
