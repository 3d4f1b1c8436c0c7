"""The loss of training examples under the finished model, for the report: the highest are often wrong labels."""

from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.run.console import Screen
from llava_accel.run.datasets import Part
from llava_accel.run.evaluation import evaluate, write_predictions

FILE = "training.jsonl"
"""In the folder of predictions."""


def score_training(
    recipe: Recipe,
    accelerator: Accelerator,
    objective: Objective,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    screen: Screen,
) -> None:
    """Answer eval.train_limit training examples, drawn with the run's seed. Every rank must call it."""
    limits = {"limit": recipe.eval.train_limit, "blind_limit": 0}
    changed = recipe.model_copy(update={"eval": recipe.eval.model_copy(update=limits)})
    found = evaluate(objective, part, changed, accelerator, tokenizer, screen)
    if accelerator.is_main_process:
        write_predictions(Path(recipe.run.output_dir) / "predictions" / FILE, found.predictions)
