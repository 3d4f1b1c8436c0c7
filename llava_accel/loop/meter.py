"""What a run measures of itself: sums on the device, one reduction per log line, metrics.jsonl, trackers."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_accel.data.loader import Loaded, tensor
from llava_accel.loop.step import Step
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import resolve_precision
from llava_accel.runtime.timing import APART, Phases, take_peak, waiting_note
from llava_accel.runtime.trackers import Trackers
from llava_accel.scoring.held_out import Evaluation
from llava_accel.setup.figures import Mix
from llava_accel.setup.state import NUM_SUMS, TrainState
from llava_accel.storage.jsonl import Lines, keep_lines_until

_SETTLED_S = 60.0
"""Only after that is waiting for data reported: a run's first batches are always slow."""


class Meter:
    """Collects without synchronising; values leave the device when a line is due.

    Lines of metrics.jsonl about steps that a resumed run will take again are removed.

    Args:
        mix: The data's sources. If there are several, the examples of each are counted.
        measures: What the objective measures besides its loss: `Objective.MEASURES`.
    """

    def __init__(
        self, run: RunContext, state: TrainState, mix: Mix | None = None, measures: Sequence[str] = ()
    ) -> None:
        recipe, accelerator, console = run.recipe, run.accelerator, run.console
        self._folder = Path(recipe.run.output_dir)
        self._accelerator, self._console, self._on_log = accelerator, console, run.on_log
        self._scales = resolve_precision(recipe.run.precision, accelerator.device) == torch.float16
        self._is_per_token = recipe.train.loss == "tokens" and recipe.train.objective == "answers"
        self._measures = tuple(measures)
        self._bar = console.open_bar("train", state.num_steps, state.step)
        self._last_step = state.step
        self._state = state
        self._mix = mix if mix is not None and len(mix.names) > 1 else None
        if self._mix:  # put on the device once, instead of in every micro-batch
            self._starts = torch.tensor(self._mix.starts[1:], device=accelerator.device)
            self._of_file = torch.tensor(self._mix.of_file, device=accelerator.device)
        state.unlogged = self._of_this_width(state.unlogged.to(accelerator.device))
        self._phases = Phases(accelerator.device)
        self.enter = self._phases.enter
        """From here on time counts for the phase that is named, one of `timing.PHASES`."""
        self.seconds: Counter[str] = Counter()
        """By phase, as far as read from the device: up to the last log line; after `close`, all of the run."""
        self._has_said_waiting = False
        self._lines = Lines(self._folder / "metrics.jsonl", console)
        if accelerator.is_main_process:
            self._keep_lines()
        self.trackers = Trackers(recipe, accelerator, console)

    def phase(self) -> str:
        """The phase that began last."""
        return self._phases.now

    def timed(self, windows: Iterable[list[Loaded]]) -> Iterator[list[Loaded]]:
        """The windows, with the time that the loop waits for each of them counted.

        The time after that counts as communication: a step first counts its targets over all ranks.
        """
        iterator = iter(windows)
        while True:
            self.enter("data_wait")
            window = next(iterator, None)
            self.enter("communication")
            if window is None:
                return
            yield window

    def add(self, window: Sequence[Loaded], step: Step) -> None:
        """Add one step of this rank: losses, targets, tokens, examples, and positions with and without a token."""
        micro_batches = zip(window, step.losses, step.divisors, step.measured, strict=True)
        for micro_batch, loss, divisor, measured in micro_batches:
            names = ("target_weights", "num_tokens", "indices", "subtree_end")
            weights, tokens, indices, ends = (tensor(micro_batch, name) for name in names)
            # Numbers that the host knows are filled in on the device: a copy would wait for it.
            counts = [len(indices), (ends == 0).sum(), ends.numel()]
            loss = loss.double() if self._is_per_token else (loss.double() / divisor).sum()
            before = self._state.unlogged
            more = [measured[name] for name in self._measures]
            sums = [loss, weights.sum(), tokens, *counts, *more, *self._of_sources(indices)]
            added = [one.to(before) if isinstance(one, Tensor) else before.new_full((), one) for one in sums]
            self._state.unlogged = before + torch.stack(added)

    def log(self, state: TrainState, last: Step) -> None:
        """Write one line for the steps since the last line. Every rank must call it: it takes part in a reduction."""
        self.enter("communication")
        total = self._accelerator.reduce(state.unlogged, reduction="sum")
        assert isinstance(total, Tensor)
        self.enter("other")
        sums = total.tolist()  # the one point where a line waits for the device
        loss_sum, num_targets, num_tokens, num_examples, num_padding, num_positions = sums[:NUM_SUMS]
        steps, ours = state.step - state.logged_step, NUM_SUMS + len(self._measures)
        of_sources = zip(self._mix.names if self._mix else (), sums[ours:], strict=True)
        phases = self._take()
        rates = last.learning_rates
        seconds = sum(phases[phase] for phase in phases if phase not in APART)
        line = {
            "step": state.step,
            "epoch": round(state.epoch, 6),
            "loss": loss_sum / (num_targets if self._is_per_token else steps),
            **{name: total / steps for name, total in zip(self._measures, sums[NUM_SUMS:ours], strict=True)},
            "learning_rate": rates.get("language_model", next(iter(rates.values()))),
            **({f"learning_rate/{part}": rate for part, rate in rates.items()} if len(rates) > 1 else {}),
            "grad_norm": last.grad_norm,
            **({"loss_scale": state.loss_scale, "num_overflows": state.num_overflows} if self._scales else {}),
            "num_targets": round(num_targets),
            "num_tokens": round(num_tokens),
            "num_examples": round(num_examples),
            **{f"num_examples/{name}": round(count) for name, count in of_sources},
            "padding": round(num_padding / num_positions, 5),
            "tokens_per_s": round(num_tokens / seconds, 1),
            "seconds": round(seconds, 4),
            **{f"{phase}_s": round(phases[phase], 4) for phase in phases},
            "peak_memory_gib": round(take_peak(self._accelerator.device) / 2**30, 3),
        }
        self._write(line)
        if not self._has_said_waiting and self.seconds.total() >= _SETTLED_S and (note := waiting_note(self.seconds)):
            self._has_said_waiting = True
            self._console.line(note)
        self._bar.advance(
            state.step - self._last_step,
            f"loss {line['loss']:.4f}  rate {line['learning_rate']:.2e}  {line['tokens_per_s']:,.0f} tokens/s",
        )
        self._last_step = state.logged_step = state.step
        state.unlogged = torch.zeros_like(state.unlogged)

    def log_eval(self, state: TrainState, evaluation: Evaluation) -> None:
        """Write the line of an evaluation, whose seconds are not the training's."""
        line = {"step": state.step, "epoch": round(state.epoch, 6), "eval": evaluation.metrics}
        speed = {"seconds": round(evaluation.seconds, 4), "answers_per_s": round(evaluation.answers_per_s, 1)}
        self._write(line | speed)
        take_peak(self._accelerator.device)  # reset it: that of generating answers does not belong to a step

    def close(self) -> None:
        """Remove the bar, read the clock for the last time, and let the trackers finish; UserError if there are
        lines that could not be written."""
        self._take(waits=True)
        self._bar.close()
        self.trackers.close()
        self._lines.close()

    def _of_this_width(self, sums: Tensor) -> Tensor:
        """The sums of a checkpoint with a place for each measure and source; those of other sources are left out."""
        ours = NUM_SUMS + len(self._measures)
        width = ours + (len(self._mix.names) if self._mix else 0)
        kept = sums if len(sums) == width else sums[:ours]
        return torch.cat([kept, sums.new_zeros(width - len(kept))])

    def _of_sources(self, indices: Tensor) -> list[Tensor]:
        """How many of these rows each source has, without waiting for the device."""
        if self._mix is None:
            return []
        sources = self._of_file[torch.bucketize(indices, self._starts, right=True)]
        return [(sources == number).sum() for number in range(len(self._mix.names))]

    def _keep_lines(self) -> None:
        state = self._state
        kept, *_ = [
            keep_lines_until(self._folder / name, state.step, self._console.line)
            for name in ("metrics.jsonl", "nonfinite.jsonl", "spikes.jsonl")
        ]
        if kept < state.num_lines:
            self._console.line(
                f"{self._lines.path} lacks {state.num_lines - kept} of the lines that were written until step {state.step}; "
                "the run goes on, and the report has a gap there"
            )
        state.num_lines = kept

    def _write(self, line: dict[str, Any]) -> None:
        self._state.num_lines += 1
        if self._accelerator.is_main_process:
            self._lines.append(line)
        if "eval" in line:
            metrics = line["eval"] | {"answers_per_s": line["answers_per_s"]}
            values = {f"eval/{key}": value for key, value in metrics.items()}
            self.trackers.log({"epoch": line["epoch"], **values}, line["step"])
        else:
            self.trackers.log({key: value for key, value in line.items() if key != "step"}, line["step"])
        if self._on_log and self._accelerator.is_main_process:
            self._on_log(copy.deepcopy(line))

    def _take(self, *, waits: bool = False) -> dict[str, float]:
        seconds = self._phases.take(waits=waits)
        self.seconds.update(seconds)  # a Counter's `update` adds
        return seconds
