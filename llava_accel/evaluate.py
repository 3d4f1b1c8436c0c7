"""Evaluate a base or an adapter on a recipe's held-out data, or score a file of predictions.

`--score` needs no model: it reads lines {"answers": [...], "prediction": ...} and adds the official VQA accuracy.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("evaluate")  # before the imports below, so that help and mistakes are answered at once


import argparse
from dataclasses import replace
from pathlib import Path

from llava_accel.console.output import Console
from llava_accel.estimate.answers import questions_at_once
from llava_accel.exceptions import UserError
from llava_accel.inference.origin import with_trained
from llava_accel.loop.machine import print_own_code
from llava_accel.loop.memory_guard import evaluation_explained, loading_explained
from llava_accel.model.processing import Processing, load_processing
from llava_accel.model.weights import check_values
from llava_accel.recipe import Recipe, load_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.determinism import determinism_explained
from llava_accel.runtime.engines import build_accelerator, prepare_frozen
from llava_accel.runtime.restored import settings_restored
from llava_accel.scoring.held_out import AtOnce, Evaluation
from llava_accel.scoring.held_out import evaluate as evaluate_part
from llava_accel.scoring.metrics import by_type, check_metric
from llava_accel.scoring.predictions_file import score_file
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import Part, open_data
from llava_accel.setup.reference import attach_reference
from llava_accel.setup.vision_cache import attach_features
from llava_accel.storage.atomic import check_out
from llava_accel.storage.jsonl import write_json_lines


@settings_restored()
@determinism_explained()
def evaluate(recipe: Recipe | Path | str, out: Path | str | None = None, adapter: str = "") -> Evaluation:
    """Evaluate the recipe's model, with `model.adapter` if it names one, on its evaluation data.

    Args:
        recipe: A recipe or its file; or the folder of a run, whose weights are evaluated as its recipe says.
        out: File for the predictions; None writes none.
        adapter: Weights that were trained with the recipe, see `--adapter`. The reference of pairs of answers is the model
            that the recipe itself names, which training started from.

    Returns:
        Metrics by name, and every answer.

    Raises:
        UserError: the recipe has no evaluation data, or model or data cannot be used.
    """
    if not isinstance(recipe, Recipe) and Path(recipe).is_dir():
        recipe, adapter = Path(recipe) / "recipe.toml", str(recipe)
    start = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, warns=not adapter)
    recipe = with_trained(start, adapter) if adapter else start
    accelerator = build_accelerator(recipe)
    console = Console(accelerator.is_main_process)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    run = RunContext(recipe, accelerator, console)
    print_own_code(recipe, console, trains=False)
    _, part = open_data(run, processing)
    if part is None:
        raise UserError(
            "data.eval: the recipe names no evaluation data. Set data.eval to a file, or set data.eval_fraction"
        )
    if adapter and recipe.train.objective == "dpo":
        _compare_with(replace(run, recipe=start), processing, part)
    with loading_explained(run, processing):
        objective, loaded = build_objective(run, processing)
    check_values(objective, recipe.model.named_base)
    attach_features(run, processing, objective, (part,))
    model = prepare_frozen(accelerator, objective)
    if not adapter:
        attach_reference(run, objective, loaded, processing, (part,))
    at_once = AtOnce(questions_at_once(run, processing, part, trains=False))
    with evaluation_explained():
        evaluation = evaluate_part(run, model, part, processing.processor.tokenizer, at_once=at_once)
    objective.flush_features()
    for line in evaluation.summary:
        console.line(line)
    for kind, table in by_type(evaluation.predictions).items():
        rows = [[name, f"{100 * score.mean:.1f} %", f"{score.num_questions:,}"] for name, score in table.items()]
        console.table(kind.replace("_", " "), ["", "score", "questions"], rows)
    if out and accelerator.is_main_process:
        write_json_lines(evaluation.predictions, Path(out))
        console.line(f"predictions: {out}")
    return evaluation


def _compare_with(run: RunContext, processing: Processing, part: Part) -> None:
    """Compute the reference of pairs with the model that training started from, which is loaded for that alone."""
    with loading_explained(run, processing):
        objective, loaded = build_objective(run, processing)
    attach_features(run, processing, objective, (part,))
    prepare_frozen(run.accelerator, objective)
    attach_reference(run, objective, loaded, processing, (part,))
    objective.flush_features()


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel evaluate RECIPE`, or `--score FILE.jsonl`."""
    out = Path(arguments.out) if arguments.out else None
    if out:
        check_out(out, "--out", "predictions.jsonl")
    if arguments.score:
        assert out is not None
        for name in (names := arguments.metrics or ["vqa_accuracy", "exact_match"]):
            check_metric(name, "--metrics")
        for name, value in score_file(Path(arguments.score), out, names).items():
            print(f"{name}: {value:.6g}")
        return
    recipe: Recipe = arguments.loaded
    evaluate(recipe, out, arguments.adapter or "")
