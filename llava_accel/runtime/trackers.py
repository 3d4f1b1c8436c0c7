"""Trackers: Accelerate's own, one at a time, so that a run never depends on one.

A tracker is other people's program, with a service that may be away, full or out of quota. Its errors have no common base
class, so any exception is caught here: the tracker is left out from then on, and the user is told.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from llava_accel import compat
from llava_accel.console.output import Console
from llava_accel.recipe import Recipe
from llava_accel.recipe.toml import flatten, toml_value

PROJECT = "llava_accel"


class Trackers:
    """The trackers that the recipe names and that are installed; only the main process has any."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, console: Console) -> None:
        self._console = console
        self._running: dict[str, GeneralTracker] = {}
        if not accelerator.is_main_process:
            return
        folder = Path(recipe.run.output_dir)
        options: dict[str, dict[str, object]] = {
            "tensorboard": {"logging_dir": str(folder)},
            "wandb": {"name": recipe.run.name, "dir": str(folder), "settings": {"quiet": True}},
            "trackio": {"name": recipe.run.name},
        }
        installed = compat.tracker_classes(accelerator)
        for name in recipe.log.trackers:
            if name not in installed:
                console.line(f"log.trackers: {name} is not installed and gets nothing. Install it, or remove it")
                continue
            made = installed[name]
            extra = options.get(name, {"logging_dir": str(folder)} if made.requires_logging_directory else {})
            self._running[name] = made("tensorboard" if name == "tensorboard" else PROJECT, **extra)
            self._guarded(name, lambda tracker: tracker.start())
            self._guarded(name, lambda tracker: tracker.store_init_configuration(_settings(recipe)))

    @property
    def are_there(self) -> bool:
        """Whether a tracker is left."""
        return bool(self._running)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Give every tracker the numbers of one line."""
        for name in list(self._running):
            self._guarded(name, lambda tracker: tracker.log(dict(values), step=step))

    def images(self, tiles: Sequence[Image.Image], step: int) -> None:
        """Give images of one size to the trackers that take any: tensorboard, wandb and trackio."""
        for name in list(self._running) if tiles else []:
            self._guarded(name, lambda tracker: _log_images(tracker, tiles, step))

    def close(self) -> None:
        """Let every tracker finish what it has begun."""
        for name in list(self._running):
            self._guarded(name, lambda tracker: tracker.finish())
        self._running.clear()

    def _guarded(self, name: str, action: Callable[..., None]) -> None:
        tracker = self._running.get(name)
        if tracker is None:
            return
        try:
            action(tracker)
        except Exception as error:
            del self._running[name]
            reason = " ".join(str(error).split())[:300]
            self._console.line(
                f"log.trackers: {name} failed and gets nothing more; the run goes on, and metrics.jsonl has every value "
                f"({type(error).__name__}: {reason})"
            )


def _log_images(tracker: GeneralTracker, tiles: Sequence[Image.Image], step: int) -> None:
    if isinstance(tracker, TensorBoardTracker):
        tracker.log_images({"held_out": np.stack([np.asarray(tile) for tile in tiles])}, step=step, dataformats="NHWC")
    elif isinstance(tracker, WandBTracker):
        tracker.log_images({"held_out": list(tiles)}, step=step)
    elif isinstance(tracker, TrackioTracker):
        import trackio  # only where the recipe names it  # pyright: ignore[reportMissingImports]  an extra

        tracker.log({f"held_out/{n}": trackio.Image(tile) for n, tile in enumerate(tiles)}, step=step)


def _settings(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The recipe as the flat table of plain values that trackers take."""
    return {
        key: value if isinstance(value, bool | int | float | str) else toml_value(value)
        for key, value in flatten(recipe.model_dump()).items()
    }
