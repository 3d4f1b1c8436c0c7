"""The one thing that is put into a peer's Trainer: a callback that holds each step until the driver lets it through."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bench.peer_steps.turnstile import NUM_LOSSES, Turnstile, plain_name

_FIGURES = {
    "grad_norm": "grad_norm", "reward_margin": "rewards/margins", "chosen_reward": "rewards/chosen",
    "chosen_log_prob": "logps/chosen", "rejected_log_prob": "logps/rejected",
}  # fmt: skip
"""Our names of figures of a step, and those of TRL."""


class Gate(TrainerCallback):
    """A step lasts from the word that lets it through to its end: data, passes, update and whatever the Trainer adds."""

    def __init__(self, turnstile: Turnstile, gradients: Path | None = None) -> None:
        """Gradients of the last step that is compared, clipped, go to a file."""
        self._turnstile, self._gradients = turnstile, gradients

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = list(kwargs["model"].parameters())
        self._turnstile.ready(
            trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            dtypes=sorted({str(parameter.dtype) for parameter in parameters}),
            versions={name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        )
        self._let_through()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._gradients and state.global_step == NUM_LOSSES - 1:
            save_gradients(kwargs["model"], self._gradients)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step <= NUM_LOSSES:
            control.should_log = True
        else:
            self._turnstile.passed()
            self._let_through()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step <= NUM_LOSSES and "loss" in kwargs["logs"]:
            logs = kwargs["logs"]
            more = {ours: logs.get(theirs) for ours, theirs in _FIGURES.items()}
            self._turnstile.passed(float(logs["loss"]), **more)
            self._let_through()

    def _let_through(self) -> None:
        self._turnstile.next()
        self._turnstile.start()


def save_gradients(model: nn.Module, path: Path) -> None:
    """The gradient of each trained weight, under its plain name."""
    named = model.named_parameters()
    save_file({plain_name(name): weight.grad for name, weight in named if weight.grad is not None}, path)


def common_arguments(given: dict[str, str]) -> dict[str, object]:
    """TrainingArguments that every peer gets, as transformers spells them."""
    return {
        "output_dir": given["out"],
        "per_device_train_batch_size": int(given["batch"]),
        "gradient_accumulation_steps": 1,
        "max_steps": 1_000_000,
        "learning_rate": float(given["learning_rate"]),
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
    }


def as_flags(arguments: dict[str, object]) -> list[str]:
    """For a command line: `--name value`."""
    return [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
