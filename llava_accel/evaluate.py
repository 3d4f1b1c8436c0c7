"""Evaluate a base or an adapter on a recipe's held-out data, or score a file of predictions.

`--score` needs no model: it reads lines {"answers": [...], "prediction": ...} and adds the official VQA accuracy.
"""

import argparse
from pathlib import Path

from llava_accel.console.command_line import read_recipe, recipe_parser, run
from llava_accel.console.output import Console
from llava_accel.exceptions import UserError
from llava_accel.inference.origin import find_adapter
from llava_accel.loop.validation import describe
from llava_accel.model.processing import load_processing
from llava_accel.model.weights import check_values
from llava_accel.recipe import Recipe
from llava_accel.runtime.engines import build_accelerator, prepare_frozen
from llava_accel.scoring.held_out import Evaluation, evaluate, write_predictions
from llava_accel.scoring.metrics import by_type, score_file
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import open_data
from llava_accel.setup.vision_cache import attach_features


def evaluate_recipe(recipe: Recipe, out: Path | None) -> Evaluation:
    """Evaluate the recipe's model, with `model.adapter` if it names one, on its evaluation data.

    Args:
        out: File for the predictions; None writes none.

    Raises:
        UserError: the recipe has no evaluation data, or model or data cannot be used.
    """
    accelerator = build_accelerator(recipe)
    console = Console(accelerator.is_main_process)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    _, part = open_data(recipe, processing, accelerator, console)
    if part is None:
        raise UserError(
            "data.eval: the recipe names no evaluation data. Set data.eval to a file, or data.eval_fraction"
        )
    objective, _ = build_objective(recipe, processing, accelerator, console)
    check_values(objective, recipe.model.base or recipe.model.language_model)
    attach_features(recipe, processing, objective, (part,), accelerator, console)
    model = prepare_frozen(accelerator, objective)
    found = evaluate(model, part, recipe, accelerator, processing.processor.tokenizer, console)
    objective.flush_features()
    console.line(describe(found))
    for kind, table in by_type(found.predictions).items():
        rows = [[name, f"{100 * score.mean:.1f} %", f"{score.num_questions:,}"] for name, score in table.items()]
        console.table(kind.replace("_", " "), ["", "score", "questions"], rows)
    if out and accelerator.is_main_process:
        write_predictions(out, found.predictions)
        console.line(f"predictions: {out}")
    return found


def main() -> None:
    """Entry point of `python -m llava_accel.evaluate`."""
    example = "python -m llava_accel.evaluate recipes/quickstart.toml --adapter runs/quickstart"
    parser = recipe_parser("evaluate", (__doc__ or "").splitlines()[0], example, needs_recipe=False)
    parser.add_argument("--adapter", metavar="DIR", help="a run, a checkpoint or an export; without it the base alone")
    parser.add_argument("--out", metavar="FILE.jsonl", help="write the predictions, one a line")
    parser.add_argument("--score", metavar="FILE.jsonl", help="score this file's predictions; takes no recipe")
    arguments = parser.parse_intermixed_args()
    run(lambda: _verb(arguments, parser))


def _verb(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    out = Path(arguments.out) if arguments.out else None
    if arguments.score:
        if out is None:
            parser.error("--score needs --out FILE.jsonl for the scored lines")
        for name, value in score_file(Path(arguments.score), out).items():
            print(f"{name}: {value:.6g}")
        return
    if arguments.recipe is None:
        parser.error("name a recipe, or a file of predictions with --score")
    if arguments.adapter:
        arguments.overrides.append(f'model.adapter="{find_adapter(Path(arguments.adapter))}"')
    evaluate_recipe(read_recipe(arguments), out)


if __name__ == "__main__":
    main()
