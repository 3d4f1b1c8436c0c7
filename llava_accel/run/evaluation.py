"""Evaluation, in the loop and outside it: loss over targets, and generated answers scored as the field scores them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llava_accel.data.loader import load_windows
from llava_accel.data.problems import DataError
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.run.answers import Prediction, answer, mean_scores
from llava_accel.run.backend import autocast
from llava_accel.run.console import Bar, Screen
from llava_accel.run.datasets import Part
from llava_accel.run.interruption import NEVER, CheckedBar, Interruption


@dataclass
class Evaluation:
    """The same on every rank."""

    metrics: dict[str, float]
    """"loss", and with generation "vqa_accuracy", "exact_match", "num_answers" and the same for blanked pictures."""
    predictions: list[Prediction] = field(default_factory=list)
    """One for each row that was answered, in the order of the data."""


def evaluate(
    model: nn.Module,
    part: Part,
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    screen: Screen,
    interruption: Interruption = NEVER,
) -> Evaluation:
    """Loss and generated answers over (at most eval.limit of) the evaluation data, sharded over ranks.

    Args:
        model: The objective, prepared or not. Its mode is restored.

    Raises:
        Interrupted: the process was asked to end meanwhile; on every rank.
    """
    objective = accelerator.unwrap_model(model)
    assert isinstance(objective, Objective)
    was_training = model.training
    model.eval()
    rows = choose_rows(part.rows, recipe.eval.limit, recipe.run.seed)
    blind_rows = choose_rows(rows, recipe.eval.blind_limit, recipe.run.seed) if recipe.eval.blind_limit else rows[:0]
    batches, blind_batches = (_batches(some, part, recipe, accelerator) for some in (rows, blind_rows))
    tokens = recipe.eval.max_new_tokens
    with (
        torch.no_grad(),
        autocast(recipe, accelerator),
        screen.bar("evaluate", 2 * len(batches) + len(blind_batches)) as plain_bar,
    ):
        bar = CheckedBar(plain_bar, interruption, accelerator)
        metrics = {"loss": _loss(objective, part, batches, recipe, accelerator, bar)}
        predictions = answer(objective, part, batches, accelerator, tokenizer, bar, max_new_tokens=tokens)
        metrics |= mean_scores(predictions)
        if len(blind_rows):
            blind = answer(
                objective, part, blind_batches, accelerator, tokenizer, bar, max_new_tokens=tokens, blind=True
            )
            metrics |= {f"blind_{name}": value for name, value in mean_scores(blind).items()}
    model.train(was_training)
    return Evaluation(metrics, predictions)


def choose_rows(rows: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """All rows, or `limit` of them drawn with the run's seed; the same at every evaluation."""
    if not limit or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng((seed, len(rows))).choice(rows, size=limit, replace=False))


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions))


def _batches(rows: np.ndarray, part: Part, recipe: Recipe, accelerator: Accelerator) -> list[list[int]]:
    """This rank's batches: neighbours in length, longest first, so that a batch that does not fit fails at once.

    Ranks get the same number, some of them empty: engines that gather weights need every rank in every forward pass.
    """
    size = 2 * recipe.train.per_device_batch_size  # no gradients are kept, so more fits than in training
    ordered = rows[np.argsort(-part.survey.lengths[rows], kind="stable")]
    batches = [ordered[start : start + size].tolist() for start in range(0, len(ordered), size)]
    batches += [[] for _ in range(-len(batches) % accelerator.num_processes)]
    return batches[accelerator.process_index :: accelerator.num_processes]


def _loss(
    objective: Objective,
    part: Part,
    batches: list[list[int]],
    recipe: Recipe,
    accelerator: Accelerator,
    bar: Bar,
) -> float:
    """Cross-entropy over all targets of all ranks, in nats a target."""

    def on_error(error: DataError) -> None:
        raise error

    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    windows = load_windows(
        part.corpus,
        part.pictures,
        [[batch] for batch in batches],
        workers=recipe.data.workers,
        device=accelerator.device,
        on_error=on_error,
    )
    for (micro_batch,) in windows:
        weights = micro_batch["target_weights"]
        assert isinstance(weights, Tensor)
        sums += torch.stack([objective(**micro_batch).double(), weights.sum().double()])
        bar.advance()
    total = accelerator.reduce(sums, reduction="sum")
    assert isinstance(total, Tensor)
    loss_sum, num_targets = total.tolist()
    return loss_sum / num_targets
