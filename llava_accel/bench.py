"""How fast a recipe trains here, and where its time goes; beside a plain transformers.Trainer with `--against trainer`.

Tokens are those of the user's examples, however few of them had to be computed. MFU is the operations of run/flops.py
for what was computed, by the time, over the rate of large matrix products on the same device.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from accelerate import Accelerator

from llava_accel.data.sampler import Window
from llava_accel.model.build import load_model
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.memory import enable_checkpointing
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.run.backend import build_accelerator, resolve_precision
from llava_accel.run.bench_loop import Job, Timed, first_windows
from llava_accel.run.bench_ranks import compare_ranks
from llava_accel.run.bench_trainer import PlainTrainer
from llava_accel.run.cli import read_recipe, recipe_parser, run
from llava_accel.run.console import Screen
from llava_accel.run.datasets import Part, open_data
from llava_accel.run.flops import costs
from llava_accel.run.objective import build_objective
from llava_accel.run.plan_trace import build_meta
from llava_accel.run.timing import APART, PHASES, matrix_rate, waiting_note


@dataclass
class Rounds:
    """What was measured, a value a round; peaks are bytes of one pass."""

    cold: list[Timed] = field(default_factory=list)
    """As in a first epoch, which fills the cache of features. None where there is no cache."""
    warm: list[Timed] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    peak: int = 0
    their_peak: int = 0


def bench(recipe: Recipe, steps: int, rounds: int, against: str | None) -> dict[str, float]:
    """Time `rounds` passes over the first `steps` windows of the recipe, and print what was found.

    Args:
        against: "trainer" runs the same examples through a plain Trainer, in turn with ours.

    Returns:
        Medians: "tokens_per_s", "examples_per_s", "mfu", "overhead", "peak_bytes", and with `against` "ratio",
        "ratio_cold" (where there is a cache) and "memory_ratio".
    """
    accelerator, screen = build_accelerator(recipe), Screen()
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    with tempfile.TemporaryDirectory() as folder:
        own = _own(recipe, Path(folder))
        training, _ = open_data(own, processing, accelerator, screen)
        windows = first_windows(own, training, steps, accelerator)
        objective, _ = build_objective(own, processing, accelerator, screen)
        job = Job(own, processing, accelerator, objective, training, windows)
        plainly = _trainer(own, processing, training, accelerator, windows) if against else None
        found = _measure(job, plainly, rounds)
    return _report(screen, own, processing, accelerator, len(windows), found)


def _own(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with a cache and a log of the bench's own: it leaves the run's alone."""
    (folder / "run").mkdir()
    changes = {
        "data": recipe.data.model_copy(update={"cache_dir": str(folder)}),
        "run": recipe.run.model_copy(update={"output_dir": str(folder / "run")}),
        "log": recipe.log.model_copy(update={"trackers": ()}),
    }
    return recipe.model_copy(update=changes)


def _trainer(
    recipe: Recipe, processing: Processing, part: Part, accelerator: Accelerator, windows: Sequence[Window]
) -> PlainTrainer:
    dtype = resolve_precision(recipe.run.precision, accelerator.device)
    loaded = load_model(recipe, processing, dtype=dtype, device=accelerator.device)
    model = prepare_trainable(loaded.model, recipe)
    enable_checkpointing(loaded.model, recipe.model.gradient_checkpointing)
    rows = [row for window in windows for micro_batch in window for row in micro_batch]
    return PlainTrainer(recipe, accelerator, model, part, rows, Path(recipe.run.output_dir) / "trainer")


def _measure(job: Job, plainly: PlainTrainer | None, rounds: int) -> Rounds:
    found = Rounds()
    job.forget_features(-1)
    job.loop()  # kernels, and the allocator
    found.peak = job.peak_bytes()
    if plainly is not None:
        found.their_peak = plainly.peak_bytes()
    for number in range(rounds):
        if job.has_cache:
            job.forget_features(number)
            found.cold.append(job.loop())
        found.warm.append(job.loop())
        found.bare.append(job.bare())
        found.loaded.append(job.loaded())
        if plainly is not None:
            found.theirs.append(plainly())
    return found


def _report(
    screen: Screen, recipe: Recipe, processing: Processing, accelerator: Accelerator, steps: int, rounds: Rounds
) -> dict[str, float]:
    warm = rounds.warm
    seconds = median(each.seconds for each in warm)
    dtype = resolve_precision(recipe.run.precision, accelerator.device)
    rate = matrix_rate(accelerator.device, dtype)
    operations = costs(build_meta(recipe, processing, dtype), processing).of(warm[0].work)
    found = {
        "tokens_per_s": warm[0].num_tokens / seconds,
        "examples_per_s": warm[0].num_examples / seconds,
        "mfu": operations / seconds / rate,
        "overhead": median(a / b - 1 for a, b in zip(rounds.loaded, rounds.bare, strict=True)),
        "peak_bytes": float(rounds.peak),
    }
    rows = [
        ["useful tokens/s", f"{found['tokens_per_s']:,.0f}"],
        ["of which were computed", f"{warm[0].work.tokens / warm[0].num_tokens:.1%}"],
        ["examples/s", f"{found['examples_per_s']:,.1f}"],
        ["MFU", f"{found['mfu']:.1%} of {rate / 1e9:,.0f} GFLOP/s"],
        ["loop over bare steps", f"{found['overhead']:+.1%}"],
        ["peak memory of tensors", f"{rounds.peak / 2**30:,.2f} GiB"],
        *[[f"  {name.replace('_', ' ')}", f"{share:.1%}"] for name in PHASES if (share := _share(warm, name))],
    ]
    if rounds.theirs:
        title = "faster than Trainer, features cached" if rounds.cold else "faster than Trainer"
        found["ratio"] = _compare(rows, title, rounds.theirs, warm)
        if rounds.cold:
            found["ratio_cold"] = _compare(rows, "faster than Trainer, first epoch", rounds.theirs, rounds.cold)
        found["memory_ratio"] = rounds.peak / rounds.their_peak
        their_gib = rounds.their_peak / 2**30
        rows.append(["peak memory over Trainer's", f"{found['memory_ratio']:.2f} x of {their_gib:,.2f} GiB"])
    screen.table(f"{steps} steps, {len(warm)} rounds", ["", ""], rows)
    if note := waiting_note({name: _share(warm, name) for name in PHASES if name not in APART}):
        screen.line(note)
    return found


def _compare(rows: list[list[str]], title: str, theirs: Sequence[float], ours: Sequence[Timed]) -> float:
    ratios = [their_s / each.seconds for their_s, each in zip(theirs, ours, strict=True)]
    rows.append([title, f"{median(ratios):.2f} x (median of {len(ratios)}; {min(ratios):.2f} to {max(ratios):.2f})"])
    return median(ratios)


def _share(timed: Sequence[Timed], phase: str) -> float:
    return median(each.phases[phase] / each.seconds for each in timed)


def main() -> None:
    """Entry point of `python -m llava_accel.bench`."""
    example = "python -m llava_accel.bench recipes/quickstart.toml --against trainer"
    parser = recipe_parser("bench", (__doc__ or "").splitlines()[0], example)
    parser.add_argument("--steps", type=int, default=10, help="windows of a pass (10)")
    parser.add_argument("--rounds", type=int, default=5, help="passes (5)")
    parser.add_argument("--against", choices=["trainer"], help="compare with a plain transformers.Trainer")
    parser.add_argument("--profiles", type=Path, nargs="+", help="launch profiles to run, each beside one process")
    parser.add_argument("--processes", type=int, default=2, help="of each profile (2)")
    arguments = parser.parse_intermixed_args()
    run(lambda: _verb(arguments))


def _verb(arguments: argparse.Namespace) -> None:
    if arguments.profiles:
        recipe, processes = read_recipe(arguments), arguments.processes
        compare_ranks(recipe, arguments.profiles, processes, arguments.steps, arguments.rounds)
        return
    bench(read_recipe(arguments), arguments.steps, arguments.rounds, arguments.against)


if __name__ == "__main__":
    main()
