"""Checks, before any weight is read, that the machine and the user's own code provide what a recipe needs."""

from collections.abc import Callable

import torch

from llava_accel.console.output import Console
from llava_accel.exceptions import UserError
from llava_accel.kernels.compiled import require_compiler
from llava_accel.kernels.liger import liger_problem
from llava_accel.loop.own_optimizer import try_own
from llava_accel.model.build import attention
from llava_accel.model.task import objective_class
from llava_accel.own_code import is_own, say_own
from llava_accel.recipe import Recipe
from llava_accel.scoring.metrics import Judged, find_metric


def check_machine(recipe: Recipe, device: torch.device) -> None:
    """Check kernels, compiler, optimizer and objective.

    Args:
        device: The one that the run computes on.

    Raises:
        UserError: something is missing; it names key, value and remedy of everything that is.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except UserError as error:
            problems.append(str(error))

    attempt(lambda: attention(recipe.model.attention))
    if recipe.model.compile:
        attempt(lambda: require_compiler(device))
    if recipe.model.kernels == "liger" and (problem := liger_problem(device)):
        problems.append(problem)
    if is_own(recipe.optim.optimizer):
        attempt(lambda: try_own(recipe.optim, device))
    if recipe.optim.optimizer == "paged_adamw_8bit" and device.type == "cpu":
        problems.append(
            "optim.optimizer: 'paged_adamw_8bit' moves pages between GPU and main memory, and there is no GPU. "
            "Use 'adamw_8bit' for this run"
        )
    attempt(lambda: objective_class(recipe))
    if problems:
        raise UserError("\n".join(problems))


def print_own_code(recipe: Recipe, console: Console, *, trains: bool = True, scores: bool = True) -> None:
    """Say which code of the user's makes the loss, the updates and the scores; whoever calls data.reader says so there.

    Raises:
        UserError: it cannot be loaded, or a score fails on a sample answer.
    """
    named = {"train.objective": recipe.train.objective} | (
        {"optim.optimizer": recipe.optim.optimizer} if trains else {}
    )
    say_own(named, console.line)
    for name in filter(is_own, recipe.eval.measured if scores else ()):
        find_metric(name).measure([Judged("a cat", ("a cat", "cat"), 0)])
        say_own({"eval.metrics": name}, console.line)
