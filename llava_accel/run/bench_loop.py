"""The loop of train.py over a few windows, with the time of each phase; and the bare steps that it stands around."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from llava_accel.data.loader import Loaded, load_windows
from llava_accel.data.problems import DataError
from llava_accel.data.sampler import Window
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.run.accumulation import count_targets, gradient_sync, seed_step
from llava_accel.run.backend import autocast, clip_gradients
from llava_accel.run.datasets import Part
from llava_accel.run.timing import Phases, wait_for


@dataclass(frozen=True, slots=True)
class Timed:
    """One pass over some windows. `seconds` is the clock's, `phases` are parts of it."""

    seconds: float
    phases: dict[str, float]
    num_tokens: int
    num_examples: int


class Job:
    """A model, an optimizer and the windows that are timed.

    Args:
        windows: Rows of the corpus.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        part: Part,
        windows: Sequence[Window],
    ) -> None:
        self.recipe, self.accelerator, self.part, self.windows = recipe, accelerator, part, windows
        self.model, self.optimizer = accelerator.prepare(objective, optimizer)
        self.model.train()

    def loop(self) -> Timed:
        """As train.py does it, data included."""
        phases = Phases(self.accelerator.device)
        return self._run(self._load(phases.enter), phases)

    def _run(self, windows: Iterator[list[Loaded]], phases: Phases) -> Timed:
        objective = self.accelerator.unwrap_model(self.model)
        assert isinstance(objective, Objective)
        objective.enter = phases.enter
        tokens = examples = 0
        phases.take()
        begun = time.perf_counter()
        for step in range(len(self.windows)):
            phases.enter("data_wait")
            window = next(windows)
            phases.enter("communication")
            seed_step(self.recipe.run.seed, step, self.accelerator.process_index)
            num_targets = count_targets(window, self.accelerator)
            for micro_batch in window:
                with gradient_sync(self.accelerator, self.model, enabled=micro_batch is window[-1]):
                    phases.enter("forward")
                    loss = self.model(**micro_batch)
                    phases.enter("backward")
                    self.accelerator.backward(loss / num_targets * self.accelerator.num_processes)
                tokens += int(_tensor(micro_batch, "num_tokens"))
                examples += len(_tensor(micro_batch, "indices"))
            phases.enter("optimizer")
            norm = clip_gradients(self.accelerator, self.model, self.recipe.optim.max_grad_norm)
            if torch.isfinite(norm):
                self.optimizer.step()
            self.optimizer.zero_grad()
        wait_for(self.accelerator.device)
        seconds = time.perf_counter() - begun
        return Timed(seconds, phases.take(), tokens, examples)

    def bare(self) -> float:
        """Seconds of forward, backward and update alone, on batches that are there already."""
        windows = list(self._load())
        objective = self.accelerator.unwrap_model(self.model)
        wait_for(self.accelerator.device)
        since = time.perf_counter()
        for window in windows:
            for micro_batch in window:
                with autocast(self.recipe, self.accelerator):
                    loss = objective(**micro_batch)  # pyright: ignore[reportCallIssue]
                loss.backward()
            self.optimizer.optimizer.step()
            self.optimizer.optimizer.zero_grad()
        wait_for(self.accelerator.device)
        return time.perf_counter() - since

    def loaded(self) -> float:
        """Seconds of the same steps in the loop's way, on batches that are there already: `bare` and the loop's own."""
        return self._run(iter(list(self._load())), Phases(self.accelerator.device)).seconds

    def _load(self, enter: Callable[[str], None] | None = None) -> Iterator[list[Loaded]]:
        def on_error(error: DataError) -> None:
            raise error

        return load_windows(
            self.part.corpus,
            self.part.pictures,
            iter(self.windows),
            workers=self.recipe.data.workers,
            device=self.accelerator.device,
            on_error=on_error,
            share_up_to=self.recipe.data.max_length if self.recipe.data.share_prefix else 0,
            enter=enter,
        )


def _tensor(batch: Loaded, name: str) -> Tensor:
    value = batch[name]
    assert isinstance(value, Tensor)
    return value
