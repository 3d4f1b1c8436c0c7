"""What checkpoints and exports hold besides the optimizer: all that inference needs, loadable without this package.

LoRA and stage 1: `adapter_config.json`, `adapter_model.safetensors` (LoRA only), `non_lora_trainables.safetensors`.
Full: a model folder for `from_pretrained` of transformers' model class. Always the processor with its chat template, and
`llava_accel.json` with base, fingerprint, template and vocabulary.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from llava_accel.exceptions import UserError
from llava_accel.model import layouts
from llava_accel.model.adapters import Put, copy_whole
from llava_accel.model.build import LoadedModel
from llava_accel.model.files import read_json
from llava_accel.model.lora import load_trainables, split_state
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.model.saved_processor import mend_config, save_processor
from llava_accel.recipe import Recipe

ADAPTER = "adapter_model.safetensors"
REST = "non_lora_trainables.safetensors"
MODEL = "model.safetensors"
FACTS = "llava_accel.json"
_PREFIX = "model."  # the objective's, before the names of its model


def save_frame(folder: Path, objective: Objective, loaded: LoadedModel, processing: Processing, recipe: Recipe) -> None:
    """Write all that inference needs but the weights: processor, facts, adapter config. Call it on the main process only.

    Args:
        folder: Must exist.
        objective: Unwrapped, for names and configs; its weights are not read.
    """
    save_processor(folder, processing)
    facts = {
        "base": recipe.model.named_base,
        "base_layout": processing.base.layout,
        "base_fingerprint": loaded.fingerprint,
        "train": recipe.model.train,
        "template": recipe.model.template,
        "vocab_size": processing.vocab_size,
        "num_image_tokens": processing.tiling.tile_tokens,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    if isinstance(objective.model, PeftModel):
        config = copy.copy(objective.model.peft_config["default"])
        config.inference_mode = True  # whoever loads it to train further says so (`is_trainable`)
        config.save_pretrained(str(folder))


def save_model_config(folder: Path, objective: Objective, names: Iterable[str]) -> dict[str, str]:
    """Write the config of a model that is trained in full, and return the names of its weights in its files.

    Args:
        names: The objective's names of its weights.

    Returns:
        The name that transformers gives each weight on the disk -> the objective's.
    """
    # Save numbers in place of the weights, under in-memory names: `save_pretrained` would rename the hub's once more.
    places = dict(enumerate(names))
    numbers = {name.removeprefix(_PREFIX): torch.tensor([number]) for number, name in places.items()}
    objective.llava.save_pretrained(folder, state_dict=numbers)
    mend_config(folder)
    stored = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    return {name: places[int(number)] for name, number in stored.items()}


def adapter_files(objective: Objective, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The weights to save of a model that is not trained in full: file -> name -> tensor.

    Args:
        state: The part of its state dict that `is_saved` chooses, gathered from all ranks.
    """
    adapter, rest = split_state(objective.model, {name.removeprefix(_PREFIX): t for name, t in state.items()})
    return ({ADAPTER: adapter} if isinstance(objective.model, PeftModel) else {}) | {REST: rest}


def is_saved(objective: Objective, recipe: Recipe) -> Callable[[str], bool]:
    """Which of the objective's weights, by name, a checkpoint holds: all of a model that is trained in full, else the
    trained ones, the projector and the newline."""
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    return lambda name: (
        recipe.model.train == "full"
        or name in trained
        or layouts.without_peft(name.removeprefix(_PREFIX)).startswith(layouts.CONNECTION)
    )


def load_saved(folder: Path, objective: Objective, put: Put = copy_whole) -> None:
    """Put the weights of a checkpoint of the same run back into the model; UserError if they do not fit.

    Args:
        put: The engine's own where ranks share each weight (`engines.weight_setter`). Every rank must call it then.
    """
    adapter = load_file(folder / ADAPTER) if (folder / ADAPTER).is_file() else {}
    if (folder / REST).is_file():
        rest = load_file(folder / REST)
    else:
        shards = sorted(folder.glob("model*.safetensors"))
        rest = {layouts.to_memory(name): t for shard in shards for name, t in load_file(shard).items()}
    load_trainables(objective.model, adapter, rest, put)


def step_saved(folder: Path) -> int | None:
    """The step whose weights a checkpoint or an export holds; None for a folder that does not say so."""
    step = read_json(folder / FACTS).get("step") if (folder / FACTS).is_file() else None
    return step if isinstance(step, int) else None


def with_step(folder: Path) -> str:
    """A folder of weights as the verbs show it: with its step, if the folder says which."""
    step = step_saved(folder)
    return str(folder) if step is None else f"{folder}, step {step:,}"


def other_base(folder: Path, base: str, fingerprint: str) -> str:
    """A note for the user if a folder's weights were trained on another base than the loaded one; empty if not, or if the
    folder does not say.

    Args:
        base: Name of the loaded base.
        fingerprint: Of the loaded base (`weights.fingerprint`).
    """
    difference = _difference(folder, base, fingerprint)
    remark = "The same model in another precision or layout gives the same answers; another model does not"
    return f"note: {difference}. {remark}" if difference else ""


def refuse_other_base(source: Path | None, base: str, fingerprint: str) -> None:
    """UserError if the checkpoint that a run resumes from (None: it starts anew) was trained on a base with other weights,
    whatever the base's name."""
    if source and (difference := _difference(source, base, fingerprint)):
        raise UserError(
            f"run.resume: {difference}, so the steps before and after would not belong to one run. Name the model that it "
            'was written with, or start from the beginning with run.resume="never"'
        )


def _difference(folder: Path, base: str, fingerprint: str) -> str:
    known = read_json(folder / FACTS).get("base_fingerprint") if (folder / FACTS).is_file() else None
    if known in (None, fingerprint):
        return ""
    return f"{folder} was trained on a base with the fingerprint {known}, and {base} has {fingerprint}"
