"""Names of weights in the three layouts of LLaVA models, and the maps between them. No tensor is touched.

* **memory**: parameter names of the model classes of transformers 5. Adapters carry these names.
* **hub**: names on disk in the models of llava-hf, which transformers still writes.
* **original**: names that LLaVA's own code writes.

| memory | hub | original |
|---|---|---|
| `model.language_model.*` | `language_model.model.*` | `model.*` |
| `lm_head.*` | `language_model.lm_head.*` | `lm_head.*` |
| `model.multi_modal_projector.linear_{1,2}.*` | `multi_modal_projector.linear_{1,2}.*` | `model.mm_projector.{0,2}.*` |
| `model.vision_tower.*` | `vision_tower.vision_model.*` | `model.vision_tower.vision_tower.vision_model.*` |
| `model.image_newline` | `image_newline` | `model.image_newline` |

The three sets of prefixes do not overlap except for `lm_head` and the newline, which are the same, so `to_memory` needs
no hint.
"""

from llava_accel.exceptions import UserError

PEFT_PREFIX = "base_model.model."
"""The prefix that peft puts before every name of the model that it wraps."""

LANGUAGE_MODEL = "model.language_model."
PROJECTOR = "model.multi_modal_projector."
TOWER = "model.vision_tower."
"""Prefixes of the three parts' in-memory names; `lm_head` is a part of its own."""
VOCABULARY = (f"{LANGUAGE_MODEL}embed_tokens.weight", "lm_head.weight")
"""In-memory names of the matrices with a row for each token."""
NEWLINE = "model.image_newline"
"""In-memory name of the embedding that ends a row of image tokens, in models that cut images into tiles."""
CONNECTION = (PROJECTOR, NEWLINE)
"""The weights between tower and language model. An adapter is useless with others, and they may not be the base's."""

_LINEAR = {"0": "linear_1", "2": "linear_2"}
_INDEX = {linear: index for index, linear in _LINEAR.items()}

# Longest prefix first: `model.` alone is the original's language model.
_TO_MEMORY = (
    (NEWLINE, NEWLINE),
    ("image_newline", NEWLINE),  # hub
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),  # original
    ("model.vision_tower.vision_model.", "model.vision_tower."),  # memory, before transformers 5
    ("model.vision_tower.", "model.vision_tower."),
    ("model.language_model.", "model.language_model."),
    ("model.multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),  # hub
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("lm_head.", "lm_head."),
    ("model.", "model.language_model."),  # original
)
_TO_HUB = (
    (NEWLINE, "image_newline"),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
_TO_ORIGINAL = (
    (NEWLINE, NEWLINE),
    ("model.language_model.", "model."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("lm_head.", "lm_head."),
)
_PROJECTOR_PREFIXES = ("model.mm_projector.", "mm_projector.", PROJECTOR, "multi_modal_projector.", "")
_HARMLESS = (".rotary_emb.inv_freq", "embeddings.position_ids")


def is_harmless(name: str) -> bool:
    """Whether `name` is a buffer that older versions saved and newer ones compute."""
    return name.endswith(_HARMLESS)


def to_memory(name: str) -> str:
    """The in-memory name of a base weight in any of the three layouts; UserError if no model class of
    transformers has a module that can hold it."""
    if name.startswith("model.mm_projector."):
        return PROJECTOR + projector_part(name)
    return _replace_prefix(name, _TO_MEMORY)


def to_hub(name: str) -> str:
    """The hub's name for an in-memory one."""
    return _replace_prefix(name, _TO_HUB)


def to_original(name: str) -> str:
    """LLaVA's own name for an in-memory one."""
    if name.startswith(PROJECTOR):
        linear, _, kind = name.removeprefix(PROJECTOR).partition(".")
        if linear in _INDEX and kind:
            return f"model.mm_projector.{_INDEX[linear]}.{kind}"
    return _replace_prefix(name, _TO_ORIGINAL)


def language_model_to_memory(name: str) -> str:
    """The name that a weight of a causal language model, or of one without a head, gets inside a LLaVA."""
    if name.startswith("lm_head."):
        return name
    return f"model.language_model.{name.removeprefix('model.')}"


def tower_to_memory(name: str) -> str | None:
    """The name that a weight of a CLIP or SigLIP folder gets inside a LLaVA; None for the text half of a whole CLIP."""
    if name.startswith(("text_model.", "logit_scale", "logit_bias", "text_projection", "visual_projection")):
        return None
    return f"model.vision_tower.{name.removeprefix('vision_model.')}"


def projector_part(name: str) -> str:
    """`linear_1.weight` and the like, from a name of a projector in the original or the hub's layout.

    It may begin with `model.mm_projector.`, `mm_projector.` or `[model.]multi_modal_projector.`, but need not.

    Raises:
        UserError: it is not a weight of a two-layer projector.
    """
    bare = name.removeprefix(PEFT_PREFIX).removeprefix("module.")
    prefix = next(prefix for prefix in _PROJECTOR_PREFIXES if bare.startswith(prefix))
    linear, _, kind = bare.removeprefix(prefix).partition(".")
    if _LINEAR.get(linear, linear) not in _INDEX or kind not in ("weight", "bias"):
        raise UserError(
            f"{name!r} is not a weight of a two-layer projector (mlp2x_gelu). Name the file that stage 1 of LLaVA made"
        )
    return f"{_LINEAR.get(linear, linear)}.{kind}"


def connection_to_memory(name: str) -> str:
    """The in-memory name of a weight in a projector's file, which may hold a newline too; UserError as `projector_part`."""
    if name.rpartition(".")[2] == "image_newline":
        return NEWLINE
    return PROJECTOR + projector_part(name)


def adapter_to_memory(name: str) -> str:
    """A key of an adapter file, with peft's prefix and in any layout, under its in-memory name, prefix kept; UserError
    if the prefix is missing, or no module can hold it."""
    if not name.startswith(PEFT_PREFIX):
        raise UserError(f"{name!r} does not begin with {PEFT_PREFIX!r}. Name an adapter that peft has saved")
    return PEFT_PREFIX + to_memory(name.removeprefix(PEFT_PREFIX))


def adapter_to_original(name: str) -> str:
    """A key of one of our adapter files under the name that LLaVA's own code expects."""
    assert name.startswith(PEFT_PREFIX), name
    return PEFT_PREFIX + to_original(name.removeprefix(PEFT_PREFIX))


def without_peft(name: str) -> str:
    """The in-memory name of a weight in a model that peft has put LoRA layers into."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def trainable_to_memory(name: str) -> str:
    """A key of non_lora_trainables (original or ours) under its in-memory name, without peft's prefix."""
    return to_memory(name.removeprefix(PEFT_PREFIX))


def trainable_to_original(name: str) -> str:
    """An in-memory name as LLaVA writes it to non_lora_trainables.bin."""
    return PEFT_PREFIX + to_original(name)


def _replace_prefix(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise UserError(
        f"{name!r} is not a weight of a LLaVA model: it does not begin with one of {[old for old, _ in prefixes]}. "
        "Name another LLaVA model, or take the weight out of the file"
    )
