"""Which checkpoint a run goes on from, and whether its recipe may."""

from pathlib import Path

from llava_accel.recipe import Recipe, load_recipe
from llava_accel.recipe.resuming import differences
from llava_accel.run.sealed import MANIFEST, complete_checkpoints, is_complete


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint to resume from: "auto" takes the run's newest complete one, "never" none.

    Raises:
        ValueError: run.resume names a folder that is no complete checkpoint, the run has none but damaged ones, or the
            recipe has changed in a way that makes another run of it.
    """
    source = _find(recipe)
    if source is not None and (changed := differences(load_recipe(source / "recipe.toml"), recipe)):
        raise ValueError(
            f"run.resume: {source} was written by a recipe with other numbers, and to go on would be neither run:\n  "
            + "\n  ".join(changed)
            + '\nSet these back, start anew with run.resume="never" (which removes its checkpoints), or give the run '
            "another run.name. To start from its weights alone, set model.adapter"
        )
    return source


def _find(recipe: Recipe) -> Path | None:
    resume, folder = recipe.run.resume, Path(recipe.run.output_dir) / "checkpoints"
    if resume == "never":
        return None
    if resume == "auto":
        found = complete_checkpoints(folder)
        intact = next((checkpoint for checkpoint in reversed(found) if is_complete(checkpoint)), None)
        if found and intact is None:
            raise ValueError(
                f"run.resume: every checkpoint in {folder} is damaged (a file differs from its {MANIFEST}). "
                'Put one back, or set run.resume = "never" to start anew'
            )
        return intact
    source = Path(resume)
    if not is_complete(source):
        raise ValueError(
            f"run.resume: {source} is no complete checkpoint (no {MANIFEST}, or a file differs from it). "
            'Name a folder runs/NAME/checkpoints/step-N, or use "auto"'
        )
    return source
