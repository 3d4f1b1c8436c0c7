"""The weights of a base, by name and still on disk: gathered from its folders, checked, and grown by the new rows."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_accel import compat
from llava_accel.exceptions import UserError
from llava_accel.families.original import NEEDS_NEWLINE
from llava_accel.model import layouts
from llava_accel.model.bases import Base, empty_model
from llava_accel.model.files import StoredTensor, is_finite, read_tensors, read_weights
from llava_accel.model.layouts import NEWLINE, PROJECTOR, TOWER, VOCABULARY
from llava_accel.sources.problems import some

Stored = dict[str, StoredTensor]
"""In-memory name -> tensor on disk."""


def gather(base: Base) -> Stored:
    """Every tensor of a base, from the checkpoint and the tower's folder.

    A tower that the recipe names replaces one inside the checkpoint, which replaces the one that its config names.

    Raises:
        UserError: a file is damaged or missing, or holds a weight that a LLaVA has no place for, or that would be ignored.
    """
    rename = layouts.language_model_to_memory if base.layout == "parts" else layouts.to_memory
    stored: Stored = {}
    for tensor in read_weights(base.folder):
        _put(stored, tensor, rename)
    has_tower = any(name.startswith(TOWER) for name in stored)
    if base.tower and (base.tower_overridden or not has_tower):
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(TOWER)}
        for tensor in read_weights(base.tower):
            _put(stored, tensor, layouts.tower_to_memory)
    if base.cuts_tower:
        cut = (f"{TOWER}encoder.layers.{base.vision.num_hidden_layers}.", f"{TOWER}head.")
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(cut)}
    if base.config.tie_word_embeddings and (head := stored.pop("lm_head.weight", None)):
        _check_tied(head, stored)
    return stored


def with_projector(stored: Stored, projector: Path | None) -> Stored:
    """The tensors of a base with the projector's file, if there is one, in the place of its own projector; UserError as
    from `gather`."""
    if projector is None:
        return stored
    given: Stored = {}
    for tensor in read_tensors(projector):
        _put(given, tensor, layouts.connection_to_memory)
    return {name: tensor for name, tensor in stored.items() if not name.startswith(PROJECTOR)} | given


def _check_tied(head: StoredTensor, stored: Stored) -> None:
    """UserError if an `lm_head` that is said to be the embedding has other numbers than it."""
    embedding = stored.get(VOCABULARY[0])
    if embedding is None or (head.shape == embedding.shape and torch.equal(head.read(), embedding.read())):
        return
    raise UserError(
        f"{head.file}: {head.name} differs from {embedding.name}, and tie_word_embeddings in config.json says that they are "
        "one. If it was trained as a matrix of its own, write false there, in text_config too; else take it out of the file"
    )


def check(stored: Mapping[str, StoredTensor], base: Base, fresh_projector: bool) -> None:
    """Compare names and shapes with those of the model, before anything is read.

    Raises:
        UserError: a weight is missing, left over, or has another shape; the file and the names are in the message.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in empty_model(base).state_dict().items()}
    if base.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    optional = {name for name in expected if fresh_projector and name.startswith(PROJECTOR)}
    optional |= {NEWLINE} if base.layout == "parts" else set()
    wrong = [
        f"{name} is {tensor.shape} in {tensor.file} and {expected[name]} in the model"
        for name, tensor in stored.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if wrong:
        raise UserError(
            f"{some(wrong)}. The configs and the weights belong to different models: copy both from the same one, "
            "and choose a projector that was trained for this language model and this vision tower"
        )
    coded = [f"{tensor.name} in {tensor.file}" for tensor in stored.values() if not tensor.is_float]
    if coded:
        raise UserError(f"{some(coded)}: quantised or integer weights cannot be used. Name a 16-bit model")
    # A language model with the same modules may have other names for its weights.
    kind = base.text.model_type
    is_other = f". Or a {kind!r} has other weights than a Llama, a Mistral or a Qwen: name one of these"
    is_other = is_other if base.layout == "parts" else ""
    missing = sorted(expected.keys() - stored.keys() - optional)
    if missing:
        where = base.tower if base.tower and missing[0].startswith(TOWER) else base.folder
        remedy = "name a trained one in model.projector" if missing[0].startswith(PROJECTOR) else "download it again"
        remedy = NEEDS_NEWLINE if missing == [NEWLINE] else remedy
        raise UserError(
            f"{where} lacks {len(missing)} weights: {some(missing)}. It is not complete: {remedy}{is_other}"
        )
    left = sorted(stored.keys() - expected.keys())
    if left:
        names = some([f"{stored[name].name} in {stored[name].file}" for name in left])
        raise UserError(
            f"The model has no place for {len(left)} weights: {names}. The configs are another model's{is_other}"
        )


def check_values(model: nn.Module, source: str) -> None:
    """Check the weights of a model that is used and not trained; in training the first step finds out.

    Args:
        source: Names the model in the error.

    Raises:
        UserError: a weight is not finite.
    """
    for name, parameter in model.named_parameters():
        # Quantised weights have a class of their own: their bits are packed into floats, which may read as NaN.
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.numel():
            if not is_finite(parameter.detach()):
                raise UserError(
                    f"{source}: {name} holds values that are not finite (NaN or infinite). Download or copy the model "
                    "again, or take an earlier checkpoint; llava_accel.check names the file"
                )


def grow_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """`tensor` with rows added up to `num_rows`, each the mean of the old ones. They are neither trained nor scored."""
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(num_rows - len(tensor), *tensor.shape[1:])])


def to_state_dict(stored: Mapping[str, StoredTensor], num_rows: int) -> dict[str, object]:
    """The state dict for `from_pretrained`, under the hub's names, so that the model is saved with those again.

    Everything but matrices that grow to `num_rows` stays on disk until its turn comes.
    """
    return {
        layouts.to_hub(name): grow_rows(tensor.read(), num_rows)
        if name in VOCABULARY and tensor.shape[0] < num_rows
        else tensor.tensor
        for name, tensor in stored.items()
    }


def straight_to(device: torch.device | None) -> dict[str, torch.device] | None:
    """`device_map` of `from_pretrained`: each weight goes to `device` as it is read, and leaves main memory.

    A map that names the CPU changes how the model is saved, and weights are read into main memory in any case.
    """
    return None if device is None or device.type == "cpu" else {"": device}


def tower_stand_ins(
    stored: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device | None
) -> dict[str, Tensor]:
    """For the state dict, one number expanded to the shape of each of the tower's weights, which then stay on disk.

    `from_pretrained` makes random weights of full size for those that it is not given. A number on another device than
    `device` would also get full size when it is moved there.
    """
    number = torch.zeros((), dtype=dtype, device=device)
    return {layouts.to_hub(TOWER + name): number.expand(t.shape) for name, t in tower_part(stored).items()}


def tower_part(stored: Mapping[str, StoredTensor]) -> Stored:
    """The vision tower's weights, by their names in it."""
    return {name.removeprefix(TOWER): tensor for name, tensor in stored.items() if name.startswith(TOWER)}


def fresh_projector(base: Base, seed: int) -> dict[str, object]:
    """A random projector for the state dict: PyTorch's own initialisation, as in LLaVA, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = compat.new_projector(base.config)
    return {layouts.to_hub(PROJECTOR + name): tensor for name, tensor in projector.state_dict().items()}


def fresh_newline(base: Base, seed: int) -> dict[str, object]:
    """A random newline for the state dict, as LLaVA's own code starts it: as large as an embedding."""
    width = int(base.text.hidden_size)
    newline = torch.randn(width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    return {layouts.to_hub(NEWLINE): newline}


def fingerprint(stored: Mapping[str, StoredTensor], base: Base) -> str:
    """Tells one base from another: a SHA-256, shortened to 16 digits.

    It covers the kinds of the parts, and of every weight the in-memory name, the shape and the first 64 entries.
    The layout does not matter, the precision does: the same model stored in bf16 is another base. It does not protect
    against forgery.
    """
    facts = (base.text.model_type, base.vision.model_type, base.vision.image_size, base.config.vision_feature_layer)
    digest = hashlib.sha256(repr(facts).encode())
    for name in sorted(stored):
        tensor = stored[name]
        first = tensor.tensor[0:1] if len(tensor.shape) > 1 else tensor.tensor[0:64]
        sample = first.flatten()[:64].contiguous().view(torch.uint8)
        digest.update(repr((name, tensor.shape)).encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _put(stored: Stored, tensor: StoredTensor, rename: Callable[[str], str | None]) -> None:
    if layouts.is_harmless(tensor.name):
        return
    try:
        name = rename(tensor.name)
    except UserError as error:
        raise UserError(f"{tensor.file}: {error}") from None
    if name in stored:
        other = stored[name]
        raise UserError(
            f"{tensor.name} in {tensor.file} and {other.name} in {other.file} are one weight of the model. "
            "Delete the file that does not belong to it, or download the model again"
        )
    if name is not None:
        stored[name] = tensor
