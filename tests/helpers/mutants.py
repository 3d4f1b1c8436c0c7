"""Wrong ways to scale and synchronise a step, each of which people have shipped. Exactness tests must fail on every one."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import llava_accel.train as train_module
from bench.traffic import Traffic
from helpers.fp64 import in_fp64
from llava_accel.checkpoint import store
from llava_accel.loop import step as step_module
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.setup.state import TrainState

_Patch = Callable[[pytest.MonkeyPatch], None]
_count = step_module.count_over_ranks


def rank_factor_dropped(patch: pytest.MonkeyPatch) -> None:
    def multiplied(own: Any, flags: Any, accelerator: Any) -> Any:
        number, flags = _count(own, flags, accelerator)
        return number * accelerator.num_processes, flags

    patch.setattr(step_module, "count_over_ranks", multiplied)


def per_rank_target_count(patch: pytest.MonkeyPatch) -> None:
    def local(own: Any, flags: Any, accelerator: Any) -> Any:
        return sum(own) * accelerator.num_processes, _count(own, flags, accelerator)[1]

    patch.setattr(step_module, "count_over_ranks", local)


def mean_per_micro_batch(patch: pytest.MonkeyPatch) -> None:
    forward = Objective.forward

    def mean(self: Objective, **batch: Any) -> torch.Tensor:
        return forward(self, **batch) / batch["target_weights"].sum().clamp(min=1)

    patch.setattr(Objective, "forward", mean)
    patch.setattr(
        step_module,
        "count_over_ranks",
        lambda own, flags, a: (torch.tensor(float(len(own) * a.num_processes)), _count(own, flags, a)[1]),
    )


def last_micro_batch_only(patch: pytest.MonkeyPatch) -> None:
    right = step_module.gradient_sync

    @contextmanager
    def forgetful(accelerator: Any, model: Any, *, enabled: bool) -> Iterator[None]:
        with right(accelerator, model, enabled=enabled):
            yield
        if not enabled:
            model.zero_grad()

    patch.setattr(step_module, "gradient_sync", forgetful)


def sync_left_off(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def never(accelerator: Any, model: Any, *, enabled: bool) -> Iterator[None]:
        accelerator.sync_gradients = enabled
        with accelerator.no_sync(model):
            yield

    patch.setattr(step_module, "gradient_sync", never)


def _run_folder(patch: pytest.MonkeyPatch) -> list[Path]:
    """What holds the folder of the run once that is opened."""
    opened, folder = train_module.write_run_files, list[Path]()

    def noting(recipe: Recipe, accelerator: Accelerator) -> None:
        opened(recipe, accelerator)
        folder.append(Path(recipe.run.output_dir))

    patch.setattr(train_module, "write_run_files", noting)
    return folder


def note_images(patch: pytest.MonkeyPatch) -> None:
    """No mutant: every rank notes the (images, targets) of its micro-batches in FOLDER/seen-RANK.txt."""
    forward, folder = Objective.forward, _run_folder(patch)

    def noting(self: Objective, **batch: Any) -> torch.Tensor:
        rank = torch.distributed.get_rank()
        with (folder[0] / f"seen-{rank}.txt").open("a") as file:
            file.write(f"{len(batch['pixel_values'])} {len(batch['target_ids'])}\n")
        return forward(self, **batch)

    patch.setattr(Objective, "forward", noting)


def note_traffic(patch: pytest.MonkeyPatch) -> None:
    """No mutant: rank 0 notes in FOLDER/traffic.jsonl what it sends within each micro-batch, and if it is a last one."""
    right, folder = step_module.gradient_sync, _run_folder(patch)

    @contextmanager
    def noting(accelerator: Any, model: Any, *, enabled: bool) -> Iterator[None]:
        with right(accelerator, model, enabled=enabled), Traffic() as traffic:
            yield
        if accelerator.is_main_process:
            with (folder[0] / "traffic.jsonl").open("a") as file:
                file.write(json.dumps({"last": enabled, **traffic.sent}) + "\n")

    patch.setattr(step_module, "gradient_sync", noting)


def note_state_dicts(patch: pytest.MonkeyPatch) -> None:
    """No mutant: rank 0 notes in FOLDER/state-dicts.jsonl the names that each `accelerator.get_state_dict` has given."""
    right, folder = Accelerator.get_state_dict, _run_folder(patch)

    def noting(self: Accelerator, *arguments: Any, **named: Any) -> Any:
        state = right(self, *arguments, **named)
        if self.is_main_process:
            assert isinstance(state, dict)
            with (folder[0] / "state-dicts.jsonl").open("a") as file:
                file.write(json.dumps(sorted(map(str, state))) + "\n")
        return state

    patch.setattr(Accelerator, "get_state_dict", noting)


def note_saves(patch: pytest.MonkeyPatch) -> None:
    """No mutant: every rank notes in FOLDER/saves-RANK.jsonl the bytes that it sends to begin a save, and that it writes."""
    begin, write, folder = store.Checkpoints._begin, store.write, _run_folder(patch)

    def note(**found: object) -> None:
        with (folder[0] / f"saves-{torch.distributed.get_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")

    def begun(self: store.Checkpoints, *arguments: Any, **named: Any) -> Any:
        with Traffic() as traffic:
            result = begin(self, *arguments, **named)
        note(sent=traffic.sent.total())
        return result

    def written(place: Path, parts: Any, threads: int, **named: Any) -> Any:
        is_behind = threading.current_thread() is not threading.main_thread()
        note(written=sum(part.nbytes for part in parts), behind=is_behind)
        return write(place, parts, threads, **named)

    patch.setattr(store.Checkpoints, "_begin", begun)
    patch.setattr(store, "write", written)


def loss_scale_too_high(patch: pytest.MonkeyPatch) -> None:
    """No mutant: the first step in fp16 overflows until the scale has come down."""
    made = TrainState.of

    def high(*arguments: Any, **named: Any) -> TrainState:
        state = made(*arguments, **named)
        state.loss_scale = 2.0**20
        return state

    patch.setattr(TrainState, "of", high)


def no_data_for_the_second_step(patch: pytest.MonkeyPatch) -> None:
    """No mutant: rank 1 has no data for the second step, as if it had been asked to end while it waited for them."""
    right = train_module.train_windows

    def cut(run: Any, *arguments: Any) -> Iterator[Any]:
        for number, window in enumerate(right(run, *arguments)):
            yield [] if number == 1 and run.accelerator.process_index == 1 else window

    patch.setattr(train_module, "train_windows", cut)


_NOTES = (
    note_images, note_traffic, note_state_dicts, note_saves, loss_scale_too_high, no_data_for_the_second_step, in_fp64,
)  # fmt: skip
NOTES: dict[str, _Patch] = {note.__name__: note for note in _NOTES}
MUTANTS: dict[str, _Patch] = {
    mutant.__name__: mutant
    for mutant in (
        rank_factor_dropped,
        per_rank_target_count,
        mean_per_micro_batch,
        last_micro_batch_only,
        sync_left_off,
    )
}


@contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Break the code for the time of a block."""
    with pytest.MonkeyPatch.context() as patch:
        if name:
            (MUTANTS | NOTES)[name](patch)
        yield
