"""Adapters of any origin: read, compared with the recipe, and put into a model.

Ours (adapter_model.safetensors, non_lora_trainables.safetensors), peft's (a projector may be in it, as a module
to save), original LLaVA's (non_lora_trainables.bin, its own key names), and those of transformers before 4.52.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from llava_accel import compat
from llava_accel.exceptions import UserError
from llava_accel.model import layouts
from llava_accel.model.files import read_json, read_tensors, resolve_folder
from llava_accel.recipe import LoraTable, ModelTable
from llava_accel.sources.problems import some

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_OTHER = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
_OTHER_KINDS = {
    "mm_projector.bin": ". It holds a projector: name it in model.projector, and leave model.adapter out",
    "non_lora_trainables.safetensors": ". It holds a projector: name it in model.projector, and leave model.adapter out",
    "config.json": ". It holds a whole model: name it in model.base, and leave model.adapter out",
}
_MERGE = (
    "Merge it into its base with peft (merge_and_unload), save the result with the base's processor, and name that in "
    "model.base"
)
_INEXPRESSIBLE = (
    "rank_pattern", "alpha_pattern", "layer_replication", "lora_bias", "trainable_token_indices", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Keys of peft's config with which an adapter computes something else than a recipe's."""
_INITIAL = (True, False, "true", "false", "gaussian", "eva", "orthogonal", "pissa", "olora")
"""Values of peft's init_lora_weights; the others change weights of the base in ways of their own."""
_OTHER_LAYERS = {
    "the vision tower": "vision_tower.", "lm_head": "lm_head.lora_", "the embeddings": ".lora_embedding_"
}  # fmt: skip
_RUN = ". Name a run, a checkpoint, an export, or another folder that peft has saved"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter under in-memory names: `lora` with peft's prefix, `rest` (projector and the like) without."""

    folder: Path
    lora: dict[str, Tensor]
    rest: dict[str, Tensor]

    def choose(self, paths: list[str]) -> list[str]:
        """The layers among `paths` that it adapts; UserError if there are none."""
        adapted = {name.removeprefix(layouts.PEFT_PREFIX).split(".lora_")[0] for name in self.lora}
        chosen = [path for path in paths if path in adapted]
        if not chosen:
            raise UserError(
                f"model.adapter: {self.folder} does not adapt any layer of this model, but layers such as "
                f"{min(adapted)}. Name the base that it was trained on"
            )
        return chosen


def read_adapter(name: str, lora: LoraTable) -> Adapter:
    """Read an adapter's folder and compare its config with the recipe's; UserError if it is not a LoRA adapter, is
    damaged, or was made with other settings."""
    folder = resolve_folder(name, "model.adapter")
    _check_config(folder, lora)
    file = _first(folder, *_ADAPTER)
    if file is None:
        raise UserError(
            f"model.adapter: {folder} has an adapter_config.json but no adapter_model.safetensors or .bin. "
            "Copy all of the adapter's folder"
        )
    other = _first(folder, *_OTHER)
    adapter, rest = {}, read_rest(other) if other else {}
    for tensor in read_tensors(file):
        if other is None and tensor.name.startswith(f"{layouts.PEFT_PREFIX}model.layers."):
            raise UserError(
                f"model.adapter: {folder} is LLaVA's own and has no non_lora_trainables.bin, so the projector that "
                "was trained with it is lost, as in LLaVA's intermediate checkpoints. Use the finished run's folder"
            )
        if ".lora_" in tensor.name:
            adapter[_renamed(layouts.adapter_to_memory, tensor.name, file)] = tensor.read_finite()
        else:
            name = _renamed(layouts.trainable_to_memory, tensor.name.replace(".base_layer.", "."), file)
            rest.setdefault(name, tensor.read_finite())
    if not adapter:
        raise UserError(f"model.adapter: {file} holds no LoRA weights. Name another adapter")
    return Adapter(folder, adapter, rest)


def read_rest(file: Path) -> dict[str, Tensor]:
    """Projector and other plain weights of a file, by in-memory names; UserError if one is not finite or not a LLaVA's."""
    return {_renamed(layouts.trainable_to_memory, each.name, file): each.read_finite() for each in read_tensors(file)}


def has_tower(name: str) -> bool:
    """Whether the adapter of that name holds weights of the vision tower. Only names are read; UserError if there is no
    such folder, or a file in it is damaged."""
    folder = resolve_folder(name, "model.adapter")
    files = (_first(folder, *_ADAPTER), _first(folder, *_OTHER))
    return any("vision_tower." in tensor.name for file in files if file for tensor in read_tensors(file))


Put = Callable[[nn.Parameter, Tensor], object]
"""Gives a parameter its value."""


def copy_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """The `Put` for parameters that are whole on this rank."""
    parameter.copy_(value)


def load_adapter(model: PeftModel, adapter: Adapter, put: Put = copy_whole) -> None:
    """Put an adapter into a model that has LoRA layers for it; UserError if a tensor has no place in the model, or a
    LoRA layer no tensor."""
    put_lora(model, adapter.lora, str(adapter.folder), put)
    put_rest(model, adapter.rest, str(adapter.folder), put)


def put_lora(model: PeftModel, state: Mapping[str, Tensor], source: str, put: Put = copy_whole) -> None:
    """Fill the LoRA layers from peft's own names; `source` is for errors."""
    own = get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()), save_embedding_layers=False)
    places = {name: parameter for name, parameter in own.items() if ".lora_" in name}
    _fill(places, state, source, put, complete=True)  # pyright: ignore[reportArgumentType]  they are parameters


def put_rest(model: nn.Module, state: Mapping[str, Tensor], source: str, put: Put = copy_whole) -> None:
    """Fill projector and other plain weights, from in-memory names without peft's prefix."""
    places = {layouts.without_peft(name): parameter for name, parameter in model.named_parameters()}
    _fill(places, state, source, put, complete=False)


def _fill(
    places: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], source: str, put: Put, *, complete: bool
) -> None:
    expected = {name: tuple((compat.partition_of(place) or [place.shape])[0]) for name, place in places.items()}
    unknown = sorted(state.keys() - expected.keys())
    if unknown:
        raise UserError(
            f"{source}: the model has no place for {len(unknown)} of its weights, such as {unknown[0]}. "
            "It belongs to another model, or adapts other layers than model.lora.targets: name the base that it was "
            "trained on, and leave model.lora.targets at 'auto'"
        )
    wrong = sorted(name for name, tensor in state.items() if tuple(tensor.shape) != expected[name])
    if wrong:
        raise UserError(
            f"{source}: {wrong[0]} is {tuple(state[wrong[0]].shape)} and {expected[wrong[0]]} in the model "
            f"({len(wrong)} such weights). It belongs to another base"
        )
    missing = sorted(expected.keys() - state.keys())
    if complete and missing:
        raise UserError(
            f"{source}: {len(missing)} LoRA weights of the model are not in it, such as {missing[0]}. "
            "Leave model.lora.targets at 'auto' to adapt the same layers as it does"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            put(places[name], tensor)


def check_kept(table: ModelTable, remedy: str = "") -> None:
    """Check that the adapter of [model] holds nothing that would be lost: beside LoRA weights, checkpoints and exports hold
    projector, newline and what is trained. Only its config and names are read.

    Args:
        remedy: The last sentence of the error.

    Raises:
        UserError: it holds vocabulary matrices, say, or a vision tower that is not trained; or was made with other settings.
    """
    if not table.adapter:
        return
    folder = resolve_folder(table.adapter, "model.adapter")
    _check_config(folder, table.lora)
    files = [file for file in (_first(folder, *_ADAPTER), _first(folder, *_OTHER)) if file]
    names = {
        _renamed(layouts.trainable_to_memory, tensor.name.replace(".base_layer.", "."), file)
        for file in files
        for tensor in read_tensors(file)
        if ".lora_" not in tensor.name
    }
    kept = (*layouts.CONNECTION, *([layouts.TOWER] if table.train_vision else []))
    biases = (".bias",) if table.lora.bias == "lora_only" else ()
    lost = sorted(name for name in names if not name.startswith(kept) and not name.endswith(biases))
    if lost:
        tower = all(name.startswith(layouts.TOWER) for name in lost)
        merge = (
            f"{'Set model.train_vision = true, or merge' if tower else 'Merge'} the adapter first (llava-accel export "
            "ADAPTER --to merged, with --base if it was trained elsewhere), name the result in model.base, and leave "
            "model.adapter out"
        )
        raise UserError(
            f"{folder} holds {some(lost)} beside its LoRA weights, and what is saved here would be without. "
            f"{remedy or merge}"
        )


def lora_settings(folder: Path) -> dict[str, object]:
    """Keys of the recipe's [model.lora] that an adapter fixes. Only names and adapter_config.json are read.

    Raises:
        UserError: it is another kind of adapter, or was made in a way that no recipe can express.
    """
    config, file = read_json(folder / "adapter_config.json"), _first(folder, *_ADAPTER)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"model.adapter: {folder} is a {config.get('peft_type')!r} adapter, and only LoRA can be continued here. "
            f"{_MERGE}"
        )
    names = [tensor.name for tensor in read_tensors(file) if ".lora_" in tensor.name] if file else []
    initial, bias, alpha = config.get("init_lora_weights", True), config.get("bias", "none"), config.get("lora_alpha")
    whole = int(alpha) if isinstance(alpha, float) and alpha.is_integer() else alpha
    others = [key for key in _INEXPRESSIBLE if config.get(key)]
    others += ["use_dora with use_rslora"] if config.get("use_dora") and config.get("use_rslora") else []
    others += [f"bias {bias!r}"] if bias not in ("none", "lora_only") else []
    others += [f"lora_alpha {alpha}"] if isinstance(whole, float) else []
    others += [f"init_lora_weights {initial!r}"] if initial not in _INITIAL else []
    others += [f"LoRA layers on {part}" for part, mark in _OTHER_LAYERS.items() if any(mark in name for name in names)]
    if others:
        raise UserError(f"model.adapter: {folder} has {', '.join(others)}, which no recipe can express. {_MERGE}")
    variant = initial if initial in ("pissa", "olora") else "lora"
    variant = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else variant
    projector = any("multi_modal_projector." in name for name in names)
    return {"rank": config.get("r"), "alpha": whole, "variant": variant, "bias": bias, "projector": projector}


def _check_config(folder: Path, lora: LoraTable) -> None:
    if not (folder / "adapter_config.json").is_file():
        others = {} if _first(folder, *_ADAPTER) else _OTHER_KINDS
        hint = next((hint for file, hint in others.items() if (folder / file).is_file()), _RUN)
        raise UserError(f"model.adapter: {folder} has no adapter_config.json, so it is not an adapter{hint}")
    for key, made_with in lora_settings(folder).items():
        wanted = getattr(lora, key)
        if wanted != made_with:
            shown, then = (str(x).lower() if isinstance(x, bool) else repr(x) for x in (wanted, made_with))
            raise UserError(
                f"model.lora.{key} is {shown}, and the adapter {folder} was made with {then}. "
                f"Set model.lora.{key} = {then} to continue it"
            )


def _renamed(rename: Callable[[str], str], name: str, file: Path) -> str:
    try:
        return rename(name)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _first(folder: Path, *names: str) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
