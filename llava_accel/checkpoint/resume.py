"""Which checkpoint a run resumes from, at which position, and which keys of its recipe may have changed since."""

from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list

from llava_accel.checkpoint.progress import read_position
from llava_accel.data.sampler import Order
from llava_accel.exceptions import UserError
from llava_accel.recipe import Recipe, load_recipe
from llava_accel.recipe.toml import flatten, toml_value
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import Part, content
from llava_accel.setup.state import TrainState
from llava_accel.sources.problems import some
from llava_accel.storage.atomic import MANIFEST, is_complete, is_ours
from llava_accel.storage.run_weights import complete_checkpoints, name_of, read_progress

# Free to change: where things are read (a checkpoint knows data and base by content) and written, what is shown and kept,
# how fast it goes (run.matmul changes fp32's rounding, and a line says so), and when a run gives up.
_SPLIT = {"train.per_device_batch_size", "train.accumulation_steps"}
_FREE_TABLES = ("eval.", "checkpoint.", "log.")
_FREE = {
    "run.name", "run.output_dir", "run.resume", "run.deterministic", "run.matmul",
    "model.base", "model.language_model", "model.vision_tower", "model.gradient_checkpointing", "model.tower_batch",
    "data.train", "data.images", "data.eval", "data.reader", "data.on_bad_record", "data.max_bad", "data.workers",
    "data.cache_features", "data.cache_dir", "data.cache_max_gb",
    "train.on_nonfinite", "train.max_nonfinite", "train.spike_factor",
    # Their product with the number of ranks is what counts, and the checkpoint knows it.
    *_SPLIT,
}  # fmt: skip
_BOUND = {"eval.metric"}  # in a free table, but the best value so far is one of that metric
_LENGTH = {"train.epochs", "train.max_steps"}
_ASKED = ("data.eval", "eval.limit", "eval.max_new_tokens")
"""Keys whose change makes scores before and after it those of other questions or answers."""


def agree_on_checkpoint(run: RunContext) -> Path | None:
    """The result of `find_checkpoint`. Only the main process reads and hashes; every rank must call it."""
    chosen = [find_checkpoint(run.recipe, run.console.line) if run.accelerator.is_main_process else None]
    return broadcast_object_list(chosen)[0]


def find_checkpoint(recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The checkpoint to resume from: "auto" takes the run's newest complete one, "never" none.

    Args:
        say: Told of those that are damaged and passed over.

    Raises:
        UserError: run.resume names a folder that is not a complete checkpoint, all of the run's are damaged or gone, or
            the recipe has changed in a way that makes another run of it.
    """
    source = _find(recipe, say)
    if source is None:
        return None
    _refuse_renamed(source, Path(recipe.run.output_dir) / "checkpoints")
    before = load_recipe(source / "recipe.toml", warns=False)
    if changed := differences(before, recipe):
        raise UserError(
            f"run.resume: {source} was written with other values of these keys, so resuming would mix two runs:\n  "
            + "\n  ".join(changed)
            + '\nSet these back, start from the beginning with run.resume="never" (which removes its checkpoints), or give '
            "the run another run.output_dir. To start from its weights alone, set model.adapter as well"
        )
    if before.run.deterministic != recipe.run.deterministic:
        now = "true" if recipe.run.deterministic else "false"
        say(
            f"run.deterministic is {now} from {source.name} on, and was not before: other kernels add up in another order"
        )
    changes = _changes(before, recipe)
    if asked := [f"{key} = {changes[key][1]} (before: {changes[key][0]})" for key in _ASKED if key in changes]:
        shown = ", ".join(asked)
        say(f"{shown}: scores from {source.name} on are of other answers, and are compared with the best one so far")
    return source


def _find(recipe: Recipe, say: Callable[[str], None]) -> Path | None:
    resume, run = recipe.run.resume, Path(recipe.run.output_dir)
    if resume == "never":
        return None
    if resume == "auto":
        return _newest(run, say)
    source = Path(resume)
    if not is_complete(source):
        raise UserError(
            f"run.resume: {source} is not a complete checkpoint (no {MANIFEST}, or a file differs from it). "
            'Name a folder runs/NAME/checkpoints/step-N, or use "auto"'
        )
    return source


def _refuse_renamed(source: Path, own: Path) -> None:
    """UserError if a checkpoint of the run's has the name of another step: what comes later is removed by its name."""
    step = read_progress(source).get("state", {}).get("step")
    if step is not None and source.resolve().parent == own.resolve() and source.name != name_of(step):
        raise UserError(f"run.resume: {source} holds step {step}, so it was renamed. Name it {name_of(step)} again")


def _newest(run: Path, say: Callable[[str], None]) -> Path | None:
    saved = complete_checkpoints(run / "checkpoints")
    kept = [path for path in (run / "best", run / "export") if is_ours(path)]
    if not saved and kept:
        raise UserError(
            f"run.resume: {run} has no checkpoint to go on from, and a run that starts from the beginning would remove what "
            f"an earlier one has left: {some(kept)}. Choose another run.name or run.output_dir, or remove it with "
            'run.resume="never"'
        )
    for checkpoint in reversed(saved):
        if is_complete(checkpoint):
            return checkpoint
        say(f"run.resume: {checkpoint} is damaged (a file differs from its {MANIFEST}) and is skipped")
    if saved:
        raise UserError(
            f"run.resume: every checkpoint in {run / 'checkpoints'} is damaged (a file differs from its {MANIFEST}). "
            'Restore one, or set run.resume = "never" to start from the beginning'
        )
    return None


def starting_state(run: RunContext, order: Order, training: Part, source: Path | None) -> TrainState:
    """The state of a run before its model is built: that of its beginning, or that of a checkpoint.

    Every rank must call it.

    Raises:
        UserError: the checkpoint's steps differ from this recipe's, see `check_position`.
    """
    state = TrainState.of(run.recipe.train, order, content(run, training))
    if source:
        read_position(source / "engine", run.recipe, run.accelerator, state)
    return state


def differences(before: Recipe, now: Recipe) -> list[str]:
    """A line `key: value before -> value now` for each key whose change makes it a different run.

    A run's length is free if the learning rate does not depend on it, and the split of a global batch if the loss does not
    depend on that.
    """
    rate_is_flat = now.optim.schedule == "constant" and now.optim.warmup_fraction == 0
    free = _FREE | (_LENGTH if rate_is_flat else set())
    if now.train.loss != "tokens":
        free = free - _SPLIT
    return [
        f"{key}: {old} -> {new}"
        for key, (old, new) in _changes(before, now).items()
        if not (key in free or (key.startswith(_FREE_TABLES) and key not in _BOUND))
    ]


def _changes(before: Recipe, now: Recipe) -> dict[str, tuple[str, str]]:
    """Key -> its value before and now, as they are shown, for each key that has changed."""
    old, new = flatten(before.model_dump()), flatten(now.model_dump())
    keys = sorted(old.keys() | new.keys())
    return {key: (_shown(old.get(key)), _shown(new.get(key))) for key in keys if old.get(key) != new.get(key)}


def _shown(value: object) -> str:
    return "not set" if value is None else toml_value(value)
