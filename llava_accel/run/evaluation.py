"""Evaluation, in the loop and outside it: loss over targets, and generated answers scored as the field scores them."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from llava_accel.data.questions import picture_batches
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.run.answers import Prediction, answer, mean_scores
from llava_accel.run.backend import autocast
from llava_accel.run.console import Screen
from llava_accel.run.datasets import Part
from llava_accel.run.interruption import NEVER, CheckedBar, Interruption


@dataclass
class Evaluation:
    """The same on every rank."""

    metrics: dict[str, float]
    """"loss", and with generation "vqa_accuracy", "exact_match", "num_answers" and the same for blanked pictures."""
    predictions: list[Prediction] = field(default_factory=list)
    """One for each row that was answered, in the order of the data."""
    seconds: float = 0.0
    """What all of it took."""

    @property
    def answers_per_s(self) -> float:
        """Answers a second over all ranks, those without a picture among them."""
        return (self.metrics["num_answers"] + self.metrics.get("blind_num_answers", 0.0)) / self.seconds


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
    was_training, since = model.training, time.perf_counter()
    model.eval()
    rows = choose_rows(part.rows, recipe.eval.limit, recipe.run.seed)
    blind_rows = choose_rows(rows, recipe.eval.blind_limit, recipe.run.seed) if recipe.eval.blind_limit else rows[:0]
    batches, blind_batches = (_batches(some, part, recipe, accelerator) for some in (rows, blind_rows))
    with (
        torch.no_grad(),
        autocast(recipe, accelerator),
        screen.bar("evaluate", len(batches) + len(blind_batches)) as plain_bar,
    ):
        bar = CheckedBar(plain_bar, interruption, accelerator)
        predictions, loss = answer(objective, part, batches, recipe, accelerator, tokenizer, bar)
        metrics = {"loss": loss, **mean_scores(predictions)}
        if len(blind_rows):
            blind, _ = answer(objective, part, blind_batches, recipe, accelerator, tokenizer, bar, blind=True)
            metrics |= {f"blind_{name}": value for name, value in mean_scores(blind).items()}
    model.train(was_training)
    return Evaluation(metrics, predictions, time.perf_counter() - since)


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
    """This rank's batches. All ranks get the same number: engines that gather weights need every rank every time."""
    size = 2 * recipe.train.per_device_batch_size  # no gradients are kept, so more fits than in training
    batches = picture_batches(rows, part.survey.lengths[rows], part.survey.image_keys[rows], size)
    batches += [[] for _ in range(-len(batches) % accelerator.num_processes)]
    return batches[accelerator.process_index :: accelerator.num_processes]
