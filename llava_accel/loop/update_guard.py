"""Guards a run against bad numbers: no update if loss or gradient is not finite, and a note about loss spikes."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from llava_accel.data.corpus import Corpus
from llava_accel.data.loader import Loaded, lengths_of, where
from llava_accel.exceptions import UserError
from llava_accel.kernels.low_rank import each_by_itself
from llava_accel.loop.loss_scale import LossScale
from llava_accel.runtime.context import RunContext
from llava_accel.setup.state import TrainState, seed_step
from llava_accel.sources.problems import some
from llava_accel.storage.jsonl import Lines

_MEDIAN_OF = 50
_MEDIAN_FROM = 10  # the loss of the first steps falls too fast to have a median


class UpdateGuard:
    """Checks every step before its update is made.

    Args:
        model: The prepared objective.
    """

    def __init__(self, run: RunContext, model: nn.Module, corpus: Corpus, state: TrainState) -> None:
        self._recipe, self._accelerator, self._console = run.recipe, run.accelerator, run.console
        self._model, self._corpus, self._state = model, corpus, state
        self.loss_scale = LossScale(run, state)
        self._folder = Path(run.recipe.run.output_dir)
        self._nonfinite = Lines(self._folder / "nonfinite.jsonl", run.console)
        self._spikes = Lines(self._folder / "spikes.jsonl", run.console)

    def watched_loss(self, losses: Sequence[Tensor], divisors: Sequence[Tensor]) -> Tensor:
        """The loss of a step over all ranks if spikes are looked for; otherwise a number that nobody reads. It stays on
        the device. Every rank must call it.

        Args:
            losses: This rank's, summed over the targets of each micro-batch.
            divisors: What these are divided by.
        """
        if not self._recipe.train.spike_factor:
            return losses[0].sum()
        own = torch.stack(list(losses)).double() / torch.stack(list(divisors))
        total = self._accelerator.reduce(own.sum(), reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def allows(self, window: Sequence[Loaded], grad_norm: float, loss: float, *, has_targets: bool) -> bool:
        """Whether the step may update the weights. Every rank must call it.

        Args:
            grad_norm: All ranks share it, and it is not finite as soon as one loss or gradient on one rank is not.
            loss: The value of `watched_loss`.
            has_targets: Whether the window has a target on any rank.

        Raises:
            UserError: the norm is not finite, and the recipe says "stop" or its limit is used up: it names the samples. Or
                the window has no target, because every record of it was left out while it was loaded.
        """
        if not math.isfinite(grad_norm):
            self._refuse(window, grad_norm, has_targets=has_targets)
            return False
        if self._recipe.train.spike_factor:
            self._look_for_spike(window, loss)
        return True

    def _refuse(self, window: Sequence[Loaded], norm: float, *, has_targets: bool) -> None:
        state, train = self._state, self._recipe.train
        if not has_targets:
            raise UserError(
                f"step {state.step + 1}: none of its records could be loaded, so there is nothing to learn from. "
                f"They are listed in {self._folder / 'skipped.txt'}. Correct or remove them"
            )
        state.num_nonfinite += 1
        seed_step(self._recipe.run.seed, state.step, self._accelerator.process_index)
        first = first_nonfinite(self._model, window, self._accelerator)
        ids, lengths = self._samples(window)
        line = {"step": state.step + 1, "grad_norm": str(norm), "first": first, "ids": ids, "lengths": lengths}
        self._append(self._nonfinite, line)
        problem = (
            f"step {state.step + 1}: the loss or gradient is not finite ({norm}), first in {first}; no update was made"
        )
        if train.on_nonfinite == "stop" or state.num_nonfinite > train.max_nonfinite:
            raise UserError(
                f"{problem}. Its samples: {some(ids, 8)} (all in {self._nonfinite.path}). Look at them, lower "
                f'optim.learning_rate, or set train.on_nonfinite = "skip"{self._of_fp16()}'
            )
        self._console.line(
            f"{problem} ({state.num_nonfinite} of at most {train.max_nonfinite}; its samples are in {self._nonfinite.path})"
        )

    def _of_fp16(self) -> str:
        if not self.loss_scale.is_used:
            return ""
        return '. fp16 holds numbers up to 65,504. A model that was trained in bf16 may need run.precision = "fp32"'

    def _look_for_spike(self, window: Sequence[Loaded], loss: float) -> None:
        recent = self._state.recent_losses
        median = statistics.median(recent) if len(recent) >= _MEDIAN_FROM else math.inf
        if loss > self._recipe.train.spike_factor * median:
            (ids, lengths), step = self._samples(window), self._state.step + 1
            self._append(self._spikes, {"step": step, "loss": loss, "median": median, "ids": ids, "lengths": lengths})
            self._console.line(
                f"note: step {step} has a loss of {loss:.4f}, {loss / median:.1f} times the median of the last "
                f"{len(recent)} steps. Its samples: {some(ids, 8)} (all in {self._spikes.path})"
            )
        self._state.recent_losses = [*recent, loss][-_MEDIAN_OF:]

    def _samples(self, window: Sequence[Loaded]) -> tuple[list[str], list[int]]:
        """Ids and lengths of the step's samples on all ranks."""
        return gather_object(where(window, self._corpus)), gather_object(lengths_of(window, self._corpus))

    def _append(self, lines: Lines, line: Mapping[str, object]) -> None:
        if self._accelerator.is_main_process:
            lines.append(line)


def first_nonfinite(model: nn.Module, window: Sequence[Loaded], accelerator: Accelerator) -> str:
    """Name of the first module whose output is not finite in this window, on any rank, else of the first such gradient.

    Runs the forward passes of the window once more; every rank must call it, with the seed of the step in force.
    """
    names: list[str] = []
    whole = accelerator.unwrap_model(model)
    assert isinstance(whole, nn.Module)
    with _watched(whole, names), each_by_itself(whole), torch.no_grad():
        for micro_batch in window:
            model(**micro_batch)
    if not names:
        gradients = ((name, parameter.grad) for name, parameter in whole.named_parameters())
        names = [
            f"the gradient of {plain(name)}" for name, value in gradients if value is not None and not _finite(value)
        ]
    everywhere: list[str] = gather_object(names[:1])
    return everywhere[0] if everywhere else "the sum over micro-batches or ranks: every module's output is finite"


@contextmanager
def _watched(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Note the names of modules without children whose output is not finite, in the order of the computation."""

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor)):
                names.append(plain(name))

        return module.register_forward_hook(look)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not any(module.children()):
                hooks.enter_context(watch(name, module))
        yield


def plain(name: str) -> str:
    """The name that a module has in transformers, without the wrappers around it."""
    return name.removeprefix("model.").removeprefix("base_model.model.")


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all()) if tensor.is_floating_point() else True
