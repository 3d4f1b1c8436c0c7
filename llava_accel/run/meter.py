"""What a run measures of itself: sums on the device, one reduction a log line, metrics.jsonl, trackers."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from llava_accel.data.loader import Loaded
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.run.console import Screen
from llava_accel.run.state import TrainState
from llava_accel.run.timing import APART, Phases, take_peak, waiting_note
from llava_accel.run.trackers import Trackers

_SETTLED_S = 60.0
"""A run's first batches are slow, and no reason to say anything."""


class Meter:
    """Collects without synchronising; values leave the device when a line is due.

    Lines of metrics.jsonl about steps that a resumed run will take again are removed.
    """

    def __init__(
        self, recipe: Recipe, accelerator: Accelerator, objective: Objective, state: TrainState, screen: Screen
    ) -> None:
        self._path = Path(recipe.run.output_dir) / "metrics.jsonl"
        self._accelerator, self._screen = accelerator, screen
        self._bar = screen.open_bar("train", state.num_steps, state.step)
        self._last_step = state.step
        self._sums = self._zeros()
        self._phases = Phases(accelerator.device)
        self.enter = objective.enter = self._phases.enter
        """From here on time counts for the phase that is named, one of `timing.PHASES`."""
        self.seconds: Counter[str] = Counter()
        """By phase, as far as it has been read from the device: up to the last line, and after `close` all of it."""
        self._has_said_waiting = False
        if accelerator.is_main_process:
            keep_lines_until(self._path, state.step)
        self.trackers = Trackers(recipe, accelerator, screen)

    def waited(self, windows: Iterable[list[Loaded]]) -> Iterator[list[Loaded]]:
        """The windows, with the time that the loop waits for each of them counted.

        Behind it counts as communication: what a step does first is count its targets over all ranks.
        """
        iterator = iter(windows)
        while True:
            self.enter("data_wait")
            window = next(iterator, None)
            self.enter("communication")
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
        self.enter("communication")
        total = self._accelerator.reduce(self._sums, reduction="sum")
        assert isinstance(total, Tensor)
        loss_sum, num_targets, num_tokens, num_examples = total.tolist()
        self.enter("other")
        phases = self._take()
        seconds = sum(phases[phase] for phase in phases if phase not in APART)
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
            "tokens_per_s": round(num_tokens / seconds, 1),
            "seconds": round(seconds, 4),
            **{f"{phase}_s": round(phases[phase], 4) for phase in phases},
            "peak_memory_gib": round(take_peak(self._accelerator.device) / 2**30, 3),
        }
        self._write(line)
        self._say_waiting()
        self._bar.advance(
            state.step - self._last_step,
            f"loss {line['loss']:.4f}  rate {line['learning_rate']:.2e}  {line['tokens_per_s']:,.0f} tokens/s",
        )
        self._last_step, self._sums = state.step, self._zeros()

    def log_eval(self, state: TrainState, values: dict[str, float], seconds: float) -> None:
        """Write the line of an evaluation that took `seconds`, which are not the training's."""
        self._write({"step": state.step, "epoch": round(state.epoch, 6), "eval": values, "seconds": round(seconds, 4)})
        take_peak(self._accelerator.device)  # that of generating answers is none of a step

    def close(self) -> None:
        """Take the bar away, read the clock for the last time, and let the trackers finish."""
        self._take()
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

    def _take(self) -> dict[str, float]:
        found = self._phases.take()
        self.seconds.update(found)  # a Counter's `update` adds
        return found

    def _say_waiting(self) -> None:
        """Say once, early in the run, that it is the data that it waits for."""
        if self._has_said_waiting or self.seconds.total() < _SETTLED_S or not (note := waiting_note(self.seconds)):
            return
        self._has_said_waiting = True
        self._screen.line(note)

    def _zeros(self) -> Tensor:
        return torch.zeros(4, dtype=torch.float64, device=self._accelerator.device)


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
