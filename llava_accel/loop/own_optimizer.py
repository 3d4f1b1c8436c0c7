"""`optim.optimizer` as a function of the user's, and its trial before any weight is read."""

from typing import Any

import torch
from torch import Tensor, nn

from llava_accel.exceptions import UserError
from llava_accel.own_code import call_own, file_of, mended_by_user
from llava_accel.recipe import OptimTable
from llava_accel.sources.problems import quoted

_KEY = "optim.optimizer"


def own_optimizer(groups: list[dict[str, Any]], optim: OptimTable) -> torch.optim.Optimizer:
    """The optimizer that the user's function returns for (groups of `parameter_groups`, the recipe's [optim]).

    Raises:
        UserError: the function fails, or returns something else, or an optimizer over other weights.
    """
    name, given = optim.optimizer, {id(each) for group in groups for each in group["params"]}
    made = call_own(_KEY, name, groups, optim)
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"{_KEY}: {name} returns {quoted(made)}. Return a torch.optim.Optimizer")
    taken = {id(each) for group in made.param_groups for each in group["params"]}
    if taken != given:
        raise UserError(
            f"{_KEY}: {name} takes {len(taken & given)} of {len(given)} weights. Give it all, and no others"
        )
    return made


def try_own(optim: OptimTable, device: torch.device) -> None:
    """Let an optimizer of the user's take two steps on two small weights.

    Raises:
        UserError: it fails, or keeps state that a checkpoint does not hold, so that a resumed run would differ.
    """
    weights = [nn.Parameter(torch.ones(shape, device=device)) for shape in ((6, 4), (6,))]
    names, rate = ("language_model", "language_model (no decay)"), optim.learning_rate
    groups = [{"params": [w], "lr": rate, "weight_decay": 0.0, "name": n} for w, n in zip(weights, names, strict=True)]
    optimizer = own_optimizer(groups, optim)
    before = [{**group, "params": None} for group in optimizer.param_groups]
    for weight in weights * 2:
        weight.grad = torch.ones_like(weight)
        with mended_by_user(_KEY, file_of(optim.optimizer), "optimizer", ", in a step"):
            optimizer.step()
    kept = {key: value for weight in weights for key, value in optimizer.state.get(weight, {}).items()}
    lost = [key for key, value in kept.items() if not isinstance(value, int | Tensor)]
    for group, old in zip(optimizer.param_groups, before, strict=True):
        lost += [key for key, value in group.items() if key != "params" and value != old.get(key)]
    if lost:
        remedy = "Keep integers and tensors, in the state of each weight"
        raise UserError(f"{_KEY}: {optim.optimizer} keeps {lost[0]!r}, which a checkpoint does not hold. {remedy}")
