"""What a recipe needs of the machine that trains it, asked before any data or weight is read."""

import torch

from llava_accel.exceptions import UserError
from llava_accel.kernels.compiled import require_compiler
from llava_accel.loop.optimizer import try_own
from llava_accel.model.build import attention
from llava_accel.own_code import is_own
from llava_accel.recipe import Recipe


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Look at kernels, compiler and optimizer.

    Args:
        device: That the run computes on.

    Raises:
        UserError: something is not there; key, value and remedy of all that is not.
    """
    problems: list[str] = []
    for check in (_attention, _compiler, _optimizer):
        try:
            check(recipe, device)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _attention(recipe: Recipe, _device: torch.device) -> None:
    attention(recipe.model.attention)


def _compiler(recipe: Recipe, device: torch.device) -> None:
    if recipe.model.compile:
        require_compiler(device)


def _optimizer(recipe: Recipe, device: torch.device) -> None:
    if is_own(recipe.optim.optimizer):
        try_own(recipe.optim, device)
    if recipe.optim.optimizer == "paged_adamw_8bit" and device.type == "cpu":
        raise UserError(
            "optim.optimizer: 'paged_adamw_8bit' moves pages between GPU and main memory, and there is no GPU. "
            "Use 'adamw_8bit' for this run"
        )
