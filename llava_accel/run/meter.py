"""What a run measures of itself: sums on the device, one reduction a log line, metrics.jsonl, trackers."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llava_accel.data.loader import Loaded
from llava_accel.recipe import Recipe
from llava_accel.run.console import Screen
from llava_accel.run.state import TrainState
from llava_accel.run.trackers import Trackers


class Meter:
    """Collects without synchronising; values leave the device when a line is due.

    Lines of metrics.jsonl about steps that a resumed run will take again are removed.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, state: TrainState, screen: Screen) -> None:
        self._path = Path(recipe.run.output_dir) / "metrics.jsonl"
        self._accelerator = accelerator
        self._bar = screen.open_bar("train", state.num_steps, state.step)
        self._last_step = state.step
        self._since = time.perf_counter()
        self._waited_s = 0.0
        self._sums = self._zeros()
        if accelerator.is_main_process:
            keep_lines_until(self._path, state.step)
        self.trackers = Trackers(recipe, accelerator, screen)

    def waited(self, windows: Iterable[list[Loaded]]) -> Iterator[list[Loaded]]:
        """The windows, with the time that the loop waits for each of them counted."""
        iterator = iter(windows)
        while True:
            since = time.perf_counter()
            window = next(iterator, None)
            self._waited_s += time.perf_counter() - since
            if window is None:
                return
            yield window

    def add(self, loss: Tensor, micro_batch: Loaded) -> None:
        """Add one micro-batch: its summed loss (detached here) and its tokens and examples."""
        weights, tokens = micro_batch["target_weights"], micro_batch["num_tokens"]
        indices = micro_batch["indices"]
        assert isinstance(weights, Tensor) and isinstance(tokens, Tensor) and isinstance(indices, Tensor)
        self._sums += torch.stack(
            [loss.detach().float(), weights.sum(), tokens.float(), self._sums.new_tensor(float(len(indices)))]
        )

    def log(self, state: TrainState, grad_norm: Tensor, rates: dict[str, float]) -> None:
        """Write one line for the steps since the last one. Takes part in a reduction: call it on every rank.

        Args:
            grad_norm: Of the last step, before clipping.
            rates: Learning rate of each part in the last step.
        """
        total = self._accelerator.reduce(self._sums, reduction="sum")
        assert isinstance(total, Tensor)
        loss_sum, num_targets, num_tokens, num_examples = total.tolist()
        now = time.perf_counter()
        line = {
            "step": state.step,
            "epoch": round(state.epoch, 6),
            "loss": loss_sum / num_targets,
            "learning_rate": rates.get("language_model", next(iter(rates.values()))),
            **({f"learning_rate/{part}": rate for part, rate in rates.items()} if len(rates) > 1 else {}),
            "grad_norm": float(grad_norm),
            "num_targets": round(num_targets),
            "num_tokens": round(num_tokens),
            "num_examples": round(num_examples),
            "tokens_per_s": round(num_tokens / (now - self._since), 1),
            "seconds": round(now - self._since, 4),
            "data_wait_s": round(self._waited_s, 4),
            **_memory(self._accelerator.device),
        }
        self._write(line)
        self._bar.advance(
            state.step - self._last_step,
            f"loss {line['loss']:.4f}  rate {line['learning_rate']:.2e}  {line['tokens_per_s']:,.0f} tokens/s",
        )
        self._last_step, self._since, self._waited_s, self._sums = state.step, now, 0.0, self._zeros()

    def log_eval(self, state: TrainState, values: dict[str, float], seconds: float) -> None:
        """Write the line of an evaluation that took `seconds`, which are not the training's."""
        self._write({"step": state.step, "epoch": round(state.epoch, 6), "eval": values, "seconds": round(seconds, 4)})
        self._since = time.perf_counter()

    def close(self) -> None:
        """Take the bar away and let the trackers finish."""
        self._bar.close()
        self.trackers.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if "eval" in line:
            values = {f"eval/{key}": value for key, value in line["eval"].items()}
            self.trackers.log({"epoch": line["epoch"], **values}, line["step"])
        else:
            self.trackers.log({key: value for key, value in line.items() if key != "step"}, line["step"])

    def _zeros(self) -> Tensor:
        return torch.zeros(4, dtype=torch.float64, device=self._accelerator.device)


def _memory(device: torch.device) -> dict[str, float]:
    """The most that tensors of this rank have taken of a GPU since the start."""
    if device.type != "cuda":
        return {}
    return {"peak_memory_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines behind `step` from a metrics file: a resumed run takes those steps again and writes them anew.

    A run that starts at step 0 keeps none: it evaluates the base anew, too.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines() if step else []:
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a killed run may be cut off
            break
        if line["step"] > step:
            break
        kept.append(text + "\n")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(kept))
    os.replace(unfinished, path)
