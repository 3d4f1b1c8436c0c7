"""What is trained: LoRA layers on the language model, the projector, the vision tower, or all of the language model.

LoRA targets are full paths. A suffix such as `q_proj` would also hit the vision tower, which has layers of that name.
"""

import copy
import difflib
import re
import warnings
from collections.abc import Iterable, Mapping

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llava_accel.exceptions import UserError
from llava_accel.families.registry import Llava
from llava_accel.model.adapters import Put, copy_whole, load_adapter, put_lora, put_rest, read_adapter
from llava_accel.model.layouts import CONNECTION, LANGUAGE_MODEL, NEWLINE, PEFT_PREFIX, PROJECTOR, without_peft
from llava_accel.model.tower import used_tower_parameters
from llava_accel.recipe import LoraTable, ModelTable, Recipe

FROM_WEIGHTS = ("pissa", "olora")
"""Variants that are initialised from the base's weights, and change them."""

Trainable = Llava | PeftModel
"""A LLaVA, or peft's wrapper around one."""


def prepare_trainable(model: Llava, recipe: Recipe, put: Put = copy_whole) -> Trainable:
    """Freeze the model, then add and unfreeze what the recipe trains; continue from its adapter if it names one.

    Trainable parameters become fp32 whatever the type of the frozen ones: bf16 loses an update of 1e-3 of a weight.

    Args:
        put: Gives a parameter the adapter's value.

    Raises:
        UserError: a LoRA target or an adapter does not fit the model.
    """
    table = recipe.model
    model.requires_grad_(False)
    prepared: Trainable = model
    if table.train == "lora":
        adapter = read_adapter(table.adapter, table.lora) if table.adapter else None
        targets = find_targets(model, table.lora.targets)
        if adapter and table.lora.targets == "auto":
            targets = adapter.choose(targets)
        if table.lora.projector:
            targets += [PROJECTOR + linear for linear in ("linear_1", "linear_2")]
        model.name_or_path = table.named_base  # peft writes down what the model calls itself
        config = lora_config(table.lora, compact(targets, model), table.named_base)
        with warnings.catch_warnings():
            # peft asks for an attribute that transformers 5 is about to rename.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            prepared = get_peft_model(model, config)
        if adapter:
            load_adapter(prepared, adapter, put)
    elif table.train == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        if isinstance(newline := getattr(model.model, "image_newline", None), nn.Parameter):
            newline.requires_grad_(True)
    if table.train_projector or table.train == "projector":
        model.model.multi_modal_projector.requires_grad_(True)
    if table.train_vision:
        for parameter in used_tower_parameters(model.model.vision_tower, model.config).values():
            parameter.requires_grad_(True)
    for parameter in prepared.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return prepared


def language_model_linears(model: nn.Module) -> list[str]:
    """Full paths of the linear layers of the language model, quantised or not; `lm_head` is not among them."""
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(LANGUAGE_MODEL) and isinstance(module, nn.Linear)
    ]


def find_targets(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Full paths of the layers that get an adapter.

    Args:
        targets: "auto" for every linear layer of the language model, or regular expressions for whole paths.

    Raises:
        UserError: an expression matches none of them.
    """
    linears = language_model_linears(model)
    if isinstance(targets, str):
        assert targets == "auto", targets
        return linears
    chosen: set[str] = set()
    for pattern in targets:
        matched = [name for name in linears if re.fullmatch(pattern, name)]
        if not matched:
            near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.0)
            raise UserError(
                f"model.lora.targets: {pattern!r} matches no linear layer of the language model. An expression must "
                f"match a whole path, such as {', '.join(near)}"
            )
        chosen.update(matched)
    return [name for name in linears if name in chosen]


def compact(targets: list[str], model: nn.Module) -> str | list[str]:
    """One regular expression that matches exactly `targets` in the model, or the list if no expression does."""
    numbered = re.compile(r"(?<=\.)\d+(?=\.)")
    patterns = {numbered.sub("#", name): None for name in targets}
    expression = "|".join(re.escape(pattern).replace(r"\#", r"\d+") for pattern in patterns)
    matched = [name for name, _ in model.named_modules() if re.fullmatch(expression, name)]
    return expression if sorted(matched) == sorted(targets) else targets


def lora_config(lora: LoraTable, targets: str | list[str], base: str) -> LoraConfig:
    """peft's own config for the recipe's table; `base` is written into it as the name of the base."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        target_modules=targets,
        init_lora_weights=lora.variant if lora.variant in FROM_WEIGHTS else True,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
    )


def without_starting_values(table: ModelTable) -> ModelTable:
    """The settings with plain LoRA, of the same size, if the variant starts from weights: for a model that has none."""
    if table.lora.variant not in FROM_WEIGHTS:
        return table
    return table.model_copy(update={"lora": table.lora.model_copy(update={"variant": "lora"})})


def split_state(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of a full state dict that a checkpoint holds.

    Args:
        model: What `prepare_trainable` returned, unwrapped.
        state: Its whole state dict, gathered, under its own names.

    Returns:
        The LoRA part as peft saves it (adapter_model.safetensors; empty without LoRA), and the rest that is trained,
        under in-memory names without peft's prefix (non_lora_trainables.safetensors). Projector and newline are always in
        the rest: they may come from a file other than the base, and an adapter is useless with others. One exception: a
        projector that PiSSA or OLoRA have changed is the base's (`recipe/rules.py`), and peft changes it again when it
        loads the adapter.
    """
    if not isinstance(model, PeftModel):
        kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return {}, {name: tensor for name, tensor in state.items() if name in kept or name.startswith(CONNECTION)}
    adapter = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    adapter = {name: tensor for name, tensor in adapter.items() if ".lora_" in name}
    kept = {name for name, p in model.named_parameters() if p.requires_grad}
    is_changed = str(model.peft_config["default"].init_lora_weights).startswith(FROM_WEIGHTS)  # pyright: ignore[reportAttributeAccessIssue]
    always = (NEWLINE,) if adapts_projector(model) and is_changed else CONNECTION
    kept |= {name for name in state if name.startswith(tuple(PEFT_PREFIX + each for each in always))}
    return adapter, {without_peft(name): state[name] for name in state if name in kept and ".lora_" not in name}


def adapts_projector(model: PeftModel) -> bool:
    """Whether there are LoRA layers on the projector."""
    return any(name.startswith(f"{PEFT_PREFIX}{PROJECTOR}linear_1.lora_") for name, _ in model.named_parameters())


def merged_projector(model: PeftModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projector's weights with its LoRA layers folded in, under in-memory names.

    Args:
        model: May be on the meta device.
        state: Its weights under its own names.
    """
    prefix = PEFT_PREFIX + PROJECTOR
    projector = copy.deepcopy(model.get_submodule(prefix.removesuffix("."))).to_empty(device="cpu")
    projector.load_state_dict({n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)})
    merged: dict[str, Tensor] = {}
    for name, layer in projector.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            merged |= {f"{PROJECTOR}{name}.{kind}": t for kind, t in layer.get_base_layer().state_dict().items()}
    return merged


def load_trainables(
    model: nn.Module, adapter: Mapping[str, Tensor], rest: Mapping[str, Tensor], put: Put = copy_whole
) -> None:
    """Put back what `split_state` took out; UserError if a tensor has no place, or a place no tensor.

    Args:
        put: The engine's own where ranks share each weight.
    """
    if isinstance(model, PeftModel):
        put_lora(model, adapter, "the checkpoint", put)
    put_rest(model, rest, "the checkpoint", put)
