"""An export from beginning to end: load, write beside its place, compare with what was trained, rename."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from llava_accel.data.images import Pictures
from llava_accel.data.labels import Example
from llava_accel.model.agreement import compare, probe_example
from llava_accel.model.bases import find_base
from llava_accel.model.files import read_weights
from llava_accel.model.processing import Processing
from llava_accel.model.save import FACTS
from llava_accel.recipe import Recipe
from llava_accel.run.card import Form, write_model_card
from llava_accel.run.console import Screen
from llava_accel.run.datasets import open_corpora
from llava_accel.run.proof import Sample, take_sample
from llava_accel.run.trained import Loaded, Trained, load_trained, with_bits

_MOST_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Job:
    """What is exported and how.

    `dtype` is the float type of a whole model on disk; None is the one that the base has on disk.
    """

    trained: Trained
    device: torch.device
    screen: Screen
    dtype: torch.dtype | None = None

    @property
    def stored(self) -> torch.dtype:
        """Float type of the base's weights on disk."""
        folder = find_base(self.trained.recipe.model).folder
        return next(tensor.tensor[0:1].dtype for tensor in read_weights(folder) if tensor.shape)

    @property
    def recipe(self) -> Recipe:
        """The recipe that loads what was trained on a base of 16 bits."""
        return with_bits(self.trained.recipe, 16)

    def load(self, *, as_trained: bool = False) -> Loaded:
        """The trained model on its 16-bit base, or quantised `as_trained`. A CPU computes in fp32."""
        trained = self.trained if as_trained else replace(self.trained, recipe=self.recipe)
        dtype = self.stored if self.device.type == "cuda" else torch.float32
        return load_trained(trained, dtype=dtype, device=self.device)

    def examples(self, processing: Processing) -> tuple[list[Example], dict[str, Tensor]]:
        """Examples to compare on, with their pictures' pixels: one that needs no data, and some of the recipe's if it is
        still there, the held-out ones before those of training."""
        example, pixels = probe_example(processing)
        if self.trained.own is None:
            return [example], pixels
        try:
            train, held_out = open_corpora(self.recipe, processing)
            corpus = train if held_out is None else held_out
            found = [corpus.encode(row).example for row in range(min(_MOST_EXAMPLES, len(corpus)))]
            read = Pictures(processing.processor.image_processor, self.recipe.data.image_aspect)  # pyright: ignore[reportArgumentType]
            pixels |= {name: read(Path(name)) for one in found for name in one.images}
        except (ValueError, OSError) as error:
            self.screen.line(f"note: compared on an example of no data set, as the recipe's data is not here: {error}")
            return [example], pixels
        return [example, *found], pixels

    def sample(self, loaded: Loaded, examples: list[Example], pixels: dict[str, Tensor]) -> Sample:
        """What a loaded model makes of these examples."""
        side = int(loaded.processing.base.vision.image_size)  # pyright: ignore[reportArgumentType]
        return take_sample(loaded.objective, examples, pixels, (3, side, side), self.device)

    def check(self, name: str, expected: Tensor, found: Tensor, dtype: torch.dtype) -> float:
        """Print how far two results of `probe` are apart, and return the largest difference.

        Raises:
            ValueError: rounding to `dtype` does not explain it.
        """
        agreement = compare(expected, found)
        self.screen.line(f"{name}: {agreement}")
        if not agreement.within(dtype):
            raise ValueError(f"{name}: the export does not compute what was trained ({agreement}), so it was removed")
        return agreement.difference


def export(job: Job, form: Form, out: Path, write: Callable[[Job, Path], dict[str, Any]]) -> None:
    """Make an export: complete and checked in its place, or not there at all.

    Args:
        out: A folder that is not there yet, or an empty one.
        write: Writes the weights into a folder that exists, checks them, and returns what it knows of the model.

    Raises:
        ValueError: the place is taken, or the source cannot be put into this form, or the result differs from it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: there is something already. Name a new folder, or remove it")
    if not job.screen.console.is_terminal:
        disable_progress_bar()
    unfinished = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made ({error.strerror}). Choose another folder") from None
    try:
        trained = job.trained
        facts = {**write(job, unfinished), **trained.facts}
        (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        if trained.own:
            shutil.copyfile(trained.folder / "recipe.toml", unfinished / "recipe.toml")
        write_model_card(unfinished, form, trained.own, facts, title=out.name)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    job.screen.line(f"exported: {out}")
