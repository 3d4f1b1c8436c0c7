"""The launch profile as `accelerate launch` hands it on, in environment variables, checked against the recipe."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from llava_accel.exceptions import UserError
from llava_accel.own_code import is_own
from llava_accel.recipe import Recipe

Backend = Literal["none", "ddp", "deepspeed", "fsdp"]

_OFF = ("", "no", "none", "false", "auto")
_SHARDS_ITSELF = "the package itself shards the weights as it reads them"


@dataclass(frozen=True, slots=True)
class Profile:
    """What the launcher decided: the backend, and its settings under Accelerate's names."""

    backend: Backend
    variables: Mapping[str, str]

    @property
    def is_distributed(self) -> bool:
        """Whether a process group is needed, even for one process."""
        return self.backend != "none"

    @property
    def wants_cpu(self) -> bool:
        """Whether GPUs are to be left alone (`use_cpu: true`)."""
        return self._is_true("ACCELERATE_USE_CPU")

    @property
    def title(self) -> str:
        """The backend's name in messages."""
        zero = f"DeepSpeed ZeRO-{self._zero_stage}"
        return {"none": "one process", "ddp": "DDP", "deepspeed": zero, "fsdp": "FSDP2"}[self.backend]

    @property
    def layout(self) -> str:
        """Name in `peak_memory.layouts`, by what the backend divides among ranks."""
        offload = self.variables.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        zero = f"zero{self._zero_stage}" + ("" if offload == "none" else "_offload")
        return {"none": "one GPU", "ddp": "ddp", "deepspeed": zero, "fsdp": "fsdp2"}[self.backend]

    @property
    def _zero_stage(self) -> str:
        return self.variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")

    def check(self, recipe: Recipe, mixed_precision: str) -> None:
        """Refuse what contradicts the recipe: the recipe decides how a step is computed, the profile where.

        Raises:
            UserError: names each of the profile's keys that does, its value, and what to write instead.
        """
        if problems := [*self._settings(recipe, mixed_precision), *self._fsdp(), *self._whole_weights(recipe)]:
            raise UserError("\n".join(problems))

    def refuses(self, recipe: Recipe) -> bool:
        """Whether the backend, whatever its settings, cannot train what the recipe says."""
        return any(self._whole_weights(recipe))

    def _settings(self, recipe: Recipe, mixed_precision: str) -> Iterator[str]:
        precision = self.variables.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if precision not in (*_OFF, mixed_precision):
            reason = f"run.precision = {recipe.run.precision!r} gives {mixed_precision!r} here"
            yield _problem("mixed_precision", precision, reason, 'Write mixed_precision: "no": the recipe decides')
        steps = self.variables.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1").lower()
        if steps not in ("1", *_OFF):
            reason = f"the loop itself makes windows of train.accumulation_steps = {recipe.train.accumulation_steps}"
            yield _problem("gradient_accumulation_steps", steps, reason, "Write 1, and set train.accumulation_steps")
        clipping = self.variables.get("ACCELERATE_GRADIENT_CLIPPING", "").lower()
        if clipping not in _OFF and not _is_number(clipping, equal_to=recipe.optim.max_grad_norm):
            reason = f"optim.max_grad_norm is {recipe.optim.max_grad_norm}"
            yield _problem("gradient_clipping", clipping, reason, "Leave the key out: the recipe decides")
        if self.backend == "deepspeed" and self._is_true("ACCELERATE_DEEPSPEED_ZERO3_INIT"):
            yield _problem("zero3_init_flag", "true", _SHARDS_ITSELF, "Write zero3_init_flag: false")
        compiler = self.variables.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if compiler.lower() not in _OFF:
            yield _problem("dynamo_backend", compiler, "model.compile decides about that", "Leave dynamo_config out")

    def _fsdp(self) -> Iterator[str]:
        if self.backend != "fsdp":
            return
        version = self.variables.get("FSDP_VERSION", "1")
        if version != "2":
            reason = "frozen and trained weights in one layer need version 2"
            yield _problem("fsdp_version", version, reason, "Write fsdp_version: 2")
        if self._is_true("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            remedy = "Write fsdp_cpu_ram_efficient_loading: false"
            yield _problem("fsdp_cpu_ram_efficient_loading", "true", _SHARDS_ITSELF, remedy)
        if self._is_true("FSDP_ACTIVATION_CHECKPOINTING"):
            reason = "model.gradient_checkpointing decides about that"
            yield _problem("fsdp_activation_checkpointing", "true", reason, "Leave the key out, and set the recipe's")

    def _whole_weights(self, recipe: Recipe) -> Iterator[str]:
        if self.backend not in ("deepspeed", "fsdp"):
            return
        if recipe.model.compile and self.layout in ("fsdp2", "zero3", "zero3_offload"):
            yield (
                f"model.compile = true is not supported with {self.title}, which gathers each layer's weights as it "
                "runs. Set false, or launch with launch/ddp.yaml or launch/zero2.yaml"
            )
        if recipe.model.quantization.bits == 8:
            yield (
                f"model.quantization.bits = 8 does not work with {self.title}: 8-bit weights need scales that this "
                "backend does not keep with them. Set 4, or launch with launch/ddp.yaml"
            )
        if is_own(recipe.optim.optimizer):
            yield (
                f"optim.optimizer = {recipe.optim.optimizer!r} does not work with {self.title}: it may need whole weights, "
                "and this backend divides them. Set 'adamw', or launch with launch/ddp.yaml"
            )
        if recipe.optim.optimizer.endswith("8bit"):
            yield (
                f"optim.optimizer = {recipe.optim.optimizer!r} does not work with {self.title}: it keeps one scale for each "
                "block of a whole tensor, and this backend divides tensors inside the blocks. Set 'adamw', whose state is "
                "divided among the ranks, or launch with launch/ddp.yaml"
            )

    def _is_true(self, name: str) -> bool:
        return self.variables.get(name, "false").lower() in ("true", "1")


def _is_number(text: str, *, equal_to: float) -> bool:
    try:
        return float(text) == equal_to
    except ValueError:
        return False


def _problem(key: str, value: str, reason: str, remedy: str) -> str:
    return f"{key} is {value!r} in the launch profile, and {reason}. {remedy}"


def read_profile() -> Profile:
    """The profile of this process. Without `accelerate launch` it is one process.

    Raises:
        UserError: the environment has only some of a launcher's variables.
    """
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not value.isdecimal() or (name == "WORLD_SIZE" and int(value) > 1 and "MASTER_ADDR" not in os.environ):
            raise UserError(
                f"the environment has {name} = {value!r}, as a launcher sets it, but not all that belongs to it. Unset it, "
                "or start the processes with llava-accel train --num-processes"
            )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        backend: Backend = "deepspeed"
    elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        backend = "fsdp"
    else:
        backend = "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "none"
    names = [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]
    return Profile(backend, {name: os.environ[name] for name in names})
