"""The same recipe through a plain transformers.Trainer: padded rows, all logits, the tower in every step."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_accel.data.labels import Example
from llava_accel.recipe import Recipe
from llava_accel.run.datasets import Part

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


def train_plainly(model: nn.Module, part: Part, rows: Sequence[int], recipe: Recipe, folder: Path) -> float:
    """Seconds that a Trainer takes for one pass over `rows`."""
    clock, on_cpu = _Clock(), not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.train.per_device_batch_size,
        gradient_accumulation_steps=recipe.train.accumulation_steps,
        num_train_epochs=1,
        learning_rate=recipe.optim.learning_rate,
        max_grad_norm=recipe.optim.max_grad_norm,
        optim="adamw_torch",
        bf16=not on_cpu and recipe.run.precision != "fp32",
        gradient_checkpointing=bool(recipe.model.gradient_checkpointing),
        dataloader_num_workers=recipe.data.workers,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=on_cpu,
    )
    trainer = Trainer(model, arguments, data_collator=padded, train_dataset=_Rows(part, rows), callbacks=[clock])  # pyright: ignore
    trainer.train()
    return clock.seconds
