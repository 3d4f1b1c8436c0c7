"""The same recipe through a plain transformers.Trainer: padded rows, all logits, the tower in every step.

    python tests/bench/plain_trainer.py recipes/quickstart.toml [--steps 10] [--rounds 5]

Learning rates, schedule, optimizer, clipping, precision, checkpointing and workers are the recipe's, as in our loop.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_accel.console.output import Console
from llava_accel.data.labels import Example
from llava_accel.data.sampler import Window
from llava_accel.data.tiling import ImageLayout
from llava_accel.loop.optimizer import build_optimizer, build_scheduler
from llava_accel.measurement.probe import Job, first_windows, peak_of, standing, with_own_folders
from llava_accel.model.build import load_model
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.memory import enable_checkpointing
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe, load_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator, resolve_precision
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import Part, open_data

_IGNORED = -100


class _Clock(TrainerCallback):
    """From the first step's data to the end of the last step; set-up is not counted."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._since = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._since


class _Rows(Dataset[tuple[Example, list[Tensor]]]):
    def __init__(self, part: Part, rows: Sequence[int]) -> None:
        self._part, self._rows = part, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> tuple[Example, list[Tensor]]:
        example = self._part.corpus.encode(self._rows[place]).example
        return example, [self._part.image_reader(view) for view in example.images]


def padded(batch: Sequence[tuple[Example, list[Tensor]]]) -> dict[str, Tensor]:
    """What a usual collator makes: `input_ids`, `attention_mask`, `labels` [rows, seq], and the fields of images."""
    seq = max(len(example.input_ids) for example, _ in batch)
    ids, mask = (torch.zeros((len(batch), seq), dtype=torch.int64) for _ in range(2))
    labels = torch.full_like(ids, _IGNORED)
    for row, (example, _) in enumerate(batch):
        length = len(example.input_ids)
        ids[row, :length], mask[row, :length] = torch.from_numpy(example.input_ids), 1
        labels[row, :length][torch.from_numpy(example.is_target)] = ids[row, :length][
            torch.from_numpy(example.is_target)
        ]
    pixels = [image for _, images in batch for image in images]
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    layouts = [view.layout for example, _ in batch for view in example.images]
    if any(layout.rows for layout in layouts):
        return found | _tiles(pixels, layouts)
    return found | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def _tiles(pixels: Sequence[Tensor], layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
    """As transformers takes images that are cut: each padded to the most tiles. All must fill their canvas."""
    most, side = max(map(len, pixels)), pixels[0].shape[-1]
    assert all(layout.window[:2] == (0, 0) and layout.rows for layout in layouts)
    sizes = [[layout.rows * side, layout.columns * side] for layout in layouts]
    padded = [F.pad(image, (0, 0) * 3 + (0, most - len(image))) for image in pixels]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes)}


class PlainTrainer:
    """A Trainer that passes over the same examples as often as it is asked to.

    Args:
        model: A LLaVA, with its adapter and its tower.
        rows: Of the corpus.
        folder: For what a Trainer writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: nn.Module,
        part: Part,
        rows: Sequence[int],
        folder: Path,
    ) -> None:
        self._recipe, self._model, self._accelerator = recipe, model.to(accelerator.device), accelerator
        self._rows, self._folder = _Rows(part, rows), folder
        self._optimizer = build_optimizer(model, recipe.optim)

    def __call__(self) -> float:
        """Seconds of one pass."""
        clock, train = _Clock(), self._recipe.train
        device = self._accelerator.device
        steps = -(-len(self._rows) // (train.per_device_batch_size * train.accumulation_steps))
        arguments = TrainingArguments(
            output_dir=str(self._folder),
            per_device_train_batch_size=train.per_device_batch_size,
            gradient_accumulation_steps=train.accumulation_steps,
            num_train_epochs=1,
            max_grad_norm=self._recipe.optim.max_grad_norm,
            bf16=resolve_precision(self._recipe.run.precision, device) == torch.bfloat16,
            dataloader_num_workers=self._recipe.data.num_workers,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        trainer = Trainer(
            self._model,  # pyright: ignore[reportArgumentType]
            arguments,
            data_collator=padded,
            train_dataset=self._rows,
            callbacks=[clock],
            optimizers=(self._optimizer, build_scheduler(self._optimizer, self._recipe.optim, steps)),  # pyright: ignore[reportArgumentType]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.seconds

    def peak_bytes(self) -> int:
        """The most memory of a pass: weights, gradients, moments and activations, of tensors alone."""
        return peak_of(self, standing([self._model], self._optimizer), self._accelerator.device)


def compare(recipe: Recipe, steps: int, rounds: int) -> dict[str, float]:
    """Pass over the first `steps` windows of the recipe, in turn with our loop and with a Trainer, and print the ratios.

    Returns:
        Medians over the rounds: "ratio" (features cached), "ratio_cold" (where there is a cache), "memory_ratio".
    """
    accelerator, console = build_accelerator(recipe), Console()
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    with tempfile.TemporaryDirectory() as folder:
        own = with_own_folders(recipe, Path(folder))
        run = RunContext(own, accelerator, console)
        training, _ = open_data(run, processing)
        windows = first_windows(run, training, steps)
        objective, _ = build_objective(run, processing)
        ours = Job(run, processing, objective, training, windows)
        theirs = _trainer(own, processing, training, accelerator, windows)
        ours.forget_features(-1)
        ours.loop()  # kernels, and the allocator
        peak, their_peak = ours.peak_bytes(), theirs.peak_bytes()
        cold, warm, seconds = [], [], []
        for number in range(rounds):
            if ours.has_cache:
                ours.forget_features(number)
                cold.append(ours.loop().seconds)
            warm.append(ours.loop().seconds)
            seconds.append(theirs())
    ratios = {"ratio": warm, "ratio_cold": cold} if cold else {"ratio": warm}
    rows, medians = [], {"memory_ratio": peak / their_peak}
    for name, own_seconds in ratios.items():
        found = [their_s / our_s for their_s, our_s in zip(seconds, own_seconds, strict=True)]
        medians[name] = median(found)
        rows.append([name, f"{median(found):.2f} x", f"{min(found):.2f} to {max(found):.2f}"])
    rows.append(["memory_ratio", f"{peak / their_peak:.2f} x", f"of {their_peak / 2**30:,.2f} GiB"])
    console.table(f"against a Trainer: {len(windows)} steps, {rounds} rounds", ["", "median", "spread"], rows)
    return medians


def _trainer(
    recipe: Recipe, processing: Processing, part: Part, accelerator: Accelerator, windows: Sequence[Window]
) -> PlainTrainer:
    dtype = resolve_precision(recipe.run.precision, accelerator.device)
    loaded = load_model(recipe, processing, dtype=dtype, device=accelerator.device)
    model = prepare_trainable(loaded.model, recipe)
    enable_checkpointing(loaded.model, recipe.model.gradient_checkpointing)
    rows = [row for window in windows for micro_batch in window for row in micro_batch]
    return PlainTrainer(recipe, accelerator, model, part, rows, Path(recipe.run.output_dir) / "trainer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    compare(load_recipe(arguments.recipe), arguments.steps, arguments.rounds)
