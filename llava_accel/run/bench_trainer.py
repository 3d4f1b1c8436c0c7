"""The same recipe through a plain transformers.Trainer: padded rows, all logits, the tower in every step.

Learning rates, schedule, optimizer, clipping, precision, checkpointing and workers are the recipe's, as in our loop.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_accel.data.labels import Example
from llava_accel.recipe import Recipe
from llava_accel.run.backend import resolve_precision
from llava_accel.run.datasets import Part
from llava_accel.run.optim import build_optimizer, build_scheduler
from llava_accel.run.probe import peak_of, standing

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
        return example, [self._part.pictures(Path(name)) for name in example.images]


def padded(batch: Sequence[tuple[Example, list[Tensor]]]) -> dict[str, Tensor]:
    """What a usual collator makes: `input_ids`, `attention_mask`, `labels` [rows, seq], `pixel_values`."""
    seq = max(len(example.input_ids) for example, _ in batch)
    ids, mask = (torch.zeros((len(batch), seq), dtype=torch.int64) for _ in range(2))
    labels = torch.full_like(ids, _IGNORED)
    for row, (example, _) in enumerate(batch):
        length = len(example.input_ids)
        ids[row, :length], mask[row, :length] = torch.from_numpy(example.input_ids), 1
        labels[row, :length][torch.from_numpy(example.is_target)] = ids[row, :length][
            torch.from_numpy(example.is_target)
        ]
    pixels = [picture for _, pictures in batch for picture in pictures]
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return found | ({"pixel_values": torch.stack(pixels)} if pixels else {})


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
            dataloader_num_workers=self._recipe.data.workers,
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
