"""Which keys may change between a run and the start that resumes it: those that leave every number as it is."""

from llava_accel.recipe.tables import Recipe
from llava_accel.recipe.toml import flatten, toml_value

# Where things are written, what is shown and kept, how fast it goes, and when a run gives up.
_FREE_TABLES = ("eval.", "checkpoint.", "log.")
_FREE = {
    "run.name", "run.output_dir", "run.resume", "model.gradient_checkpointing",
    "data.eval", "data.on_bad_record", "data.max_bad", "data.workers",
    "data.cache_features", "data.cache_dir", "data.cache_max_gb",
    "train.on_nonfinite", "train.max_nonfinite", "train.spike_factor",
    # Their product with the number of ranks is what counts, and the checkpoint knows it.
    "train.per_device_batch_size", "train.accumulation_steps",
}  # fmt: skip
_BOUND = {"eval.metric"}  # in a free table, but the best value so far is of that metric
_LENGTH = {"train.epochs", "train.max_steps"}


def differences(before: Recipe, now: Recipe) -> list[str]:
    """A line `key: value before -> value now` for each key that makes another run of it.

    The length of a run is free where the rate does not depend on it.
    """
    rate_is_flat = now.optim.schedule == "constant" and now.optim.warmup_fraction == 0
    free = _FREE | (_LENGTH if rate_is_flat else set())
    old, new = flatten(before.model_dump()), flatten(now.model_dump())
    return [
        f"{key}: {toml_value(old.get(key))} -> {toml_value(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not (key in free or (key.startswith(_FREE_TABLES) and key not in _BOUND))
    ]
