"""Which objective a recipe trains: answers, pairs of answers, or a class of the user's own."""

import torch
from torch import nn

from llava_accel.exceptions import UserError
from llava_accel.model.objective import Objective
from llava_accel.model.preference import Preference
from llava_accel.own_code import is_own, load_own
from llava_accel.recipe import Recipe


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
    found = load_own("train.objective", name)
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UserError(
            f"train.objective = {name!r} is not a class that inherits from llava_accel.model.objective.Objective. Write "
            "class NAME(Objective), with a `loss` of its own"
        )
    return found


def new_objective(recipe: Recipe, model: nn.Module, vocab_size: int, dtype: torch.dtype) -> Objective:
    """The recipe's objective around a model; see `Objective` for the arguments."""
    table = recipe.model
    objective = objective_class(recipe)(model, vocab_size, dtype, table.train_vision, table.tower_batch)
    if isinstance(objective, Preference):
        objective.table = recipe.preference
    return objective
