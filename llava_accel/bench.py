"""How fast a recipe trains here, and where its time goes; beside a plain transformers.Trainer with `--against trainer`.

Tokens are those of the user's examples, however few of them had to be computed. MFU is the operations of run/flops.py
by the time, over the rate of large matrix products on the same device.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from llava_accel.data.sampler import Window, deal
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.run.backend import build_accelerator, resolve_precision
from llava_accel.run.bench_loop import Job, Timed
from llava_accel.run.bench_trainer import train_plainly
from llava_accel.run.cli import read_recipe, recipe_parser, run
from llava_accel.run.console import Screen
from llava_accel.run.datasets import Part, build_order, open_data
from llava_accel.run.features import attach_features
from llava_accel.run.flops import Costs, costs
from llava_accel.run.objective import build_objective
from llava_accel.run.optim import build_optimizer
from llava_accel.run.plan_trace import build_meta
from llava_accel.run.timing import PHASES, matrix_rate, waiting_note


def bench(recipe: Recipe, steps: int, rounds: int, against: str | None) -> dict[str, float]:
    """Time `rounds` passes over the first `steps` windows of the recipe, and print what was found.

    Args:
        against: "trainer" runs the same examples through a plain Trainer, in turn with ours.

    Returns:
        Medians: "tokens_per_s", "examples_per_s", "mfu", "overhead", and with `against` "ratio" and "ratio_cold".
    """
    accelerator, screen = build_accelerator(recipe), Screen()
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    with tempfile.TemporaryDirectory() as folder:
        # A cache of its own, so that the first pass is a cold one.
        own = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_dir": folder})})
        training, _ = open_data(own, processing, accelerator, screen)
        job = _job(own, processing, training, accelerator, screen, steps)
        cold = job.loop()
        job.accelerator.unwrap_model(job.model).flush_features()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        job.loop()  # kernels and caches warm
        plainly = _trainer(own, processing, training, accelerator, job.windows, Path(folder)) if against else None
        timed: list[Timed] = []
        bare: list[float] = []
        loaded: list[float] = []
        theirs: list[float] = []
        for _ in range(rounds):
            timed.append(job.loop())
            bare.append(job.bare())
            loaded.append(job.loaded())
            if plainly is not None:
                theirs.append(plainly())
    return _report(screen, own, processing, training, job, accelerator, cold, timed, bare, loaded, theirs)


def _job(
    recipe: Recipe, processing: Processing, part: Part, accelerator: Accelerator, screen: Screen, steps: int
) -> Job:
    objective, _ = build_objective(recipe, processing, accelerator, screen)
    attach_features(recipe, processing, objective, (part,), accelerator, screen)
    return Job(
        recipe, accelerator, objective, build_optimizer(objective, recipe.optim), part, _windows(recipe, part, steps)
    )


def _windows(recipe: Recipe, part: Part, steps: int) -> list[Window]:
    order = build_order(recipe, part, 1)
    size = recipe.train.per_device_batch_size
    batches = order.epoch(0)[:steps]
    dealt = [deal(batch, order.sort_lengths, per_device_batch_size=size, num_ranks=1)[0] for batch in batches]
    return [[part.rows[np.array(micro_batch)].tolist() for micro_batch in window] for window in dealt]


def _trainer(
    recipe: Recipe,
    processing: Processing,
    part: Part,
    accelerator: Accelerator,
    windows: Sequence[Window],
    folder: Path,
) -> Callable[[], float]:
    data = recipe.data.model_copy(update={"cache_features": False})
    plain = recipe.model_copy(update={"data": data})
    objective, _ = build_objective(plain, processing, accelerator, Screen(False))
    rows = [row for window in windows for micro_batch in window for row in micro_batch]
    return lambda: train_plainly(objective.model, part, rows, plain, folder / "trainer")


def _report(
    screen: Screen,
    recipe: Recipe,
    processing: Processing,
    part: Part,
    job: Job,
    accelerator: Accelerator,
    cold: Timed,
    timed: Sequence[Timed],
    bare: Sequence[float],
    loaded: Sequence[float],
    theirs: Sequence[float],
) -> dict[str, float]:
    seconds = statistics.median(each.seconds for each in timed)
    dtype = resolve_precision(recipe.run.precision, accelerator.device)
    rate = matrix_rate(accelerator.device, dtype)
    operations = _operations(costs(build_meta(recipe, processing, dtype), processing), part, job.windows)
    found = {
        "tokens_per_s": timed[0].num_tokens / seconds,
        "examples_per_s": timed[0].num_examples / seconds,
        "mfu": operations / seconds / rate,
        "overhead": statistics.median(a / b - 1 for a, b in zip(loaded, bare, strict=True)),
    }
    if theirs:
        ratios = [theirs_s / each.seconds for each, theirs_s in zip(timed, theirs, strict=True)]
        found |= {"ratio": statistics.median(ratios), "ratio_cold": statistics.median(theirs) / cold.seconds}
    rows = [
        ["useful tokens/s", f"{found['tokens_per_s']:,.0f}"],
        ["examples/s", f"{found['examples_per_s']:,.1f}"],
        ["MFU", f"{found['mfu']:.1%} of {rate / 1e9:,.0f} GFLOP/s"],
        ["loop over bare steps", f"{found['overhead']:+.1%}"],
        *[[f"  {name.replace('_', ' ')}", f"{share:.1%}"] for name in PHASES if (share := _share(timed, name))],
    ]
    if accelerator.device.type == "cuda":
        rows.append(["peak memory", f"{torch.cuda.max_memory_allocated() / 2**30:,.2f} GiB"])
    if theirs:
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"  # pyright: ignore[reportPossiblyUnboundVariable]
        rows.append(
            ["faster than Trainer, features cached", f"{found['ratio']:.2f} x (median of {len(ratios)}; {spread})"]  # pyright: ignore[reportPossiblyUnboundVariable]
        )
        rows.append(["faster than Trainer, first epoch", f"{found['ratio_cold']:.2f} x"])
    screen.table(f"{len(job.windows)} steps, {len(timed)} rounds", ["", ""], rows)
    if note := waiting_note({name: _share(timed, name) for name in PHASES}):
        screen.line(note)
    return found


def _share(timed: Sequence[Timed], phase: str) -> float:
    return statistics.median(each.phases[phase] / each.seconds for each in timed)


def _operations(each: Costs, part: Part, windows: Sequence[Window]) -> int:
    rows = np.array([row for window in windows for micro_batch in window for row in micro_batch])
    survey = part.survey
    lengths, targets = survey.lengths[rows].tolist(), int(survey.num_targets[rows].sum())
    pictures = int(survey.num_images[rows].sum())
    return each.batch(lengths, targets, pictures, pictures if part.pictures.store is None else 0)


def main() -> None:
    """Entry point of `python -m llava_accel.bench`."""
    example = "python -m llava_accel.bench recipes/quickstart.toml --against trainer"
    parser = recipe_parser("bench", (__doc__ or "").splitlines()[0], example)
    parser.add_argument("--steps", type=int, default=10, help="windows of a pass (10)")
    parser.add_argument("--rounds", type=int, default=5, help="passes (5)")
    parser.add_argument("--against", choices=["trainer"], help="compare with a plain transformers.Trainer")
    arguments = parser.parse_intermixed_args()
    run(lambda: _verb(arguments))


def _verb(arguments: argparse.Namespace) -> None:
    bench(read_recipe(arguments), arguments.steps, arguments.rounds, arguments.against)


if __name__ == "__main__":
    main()
