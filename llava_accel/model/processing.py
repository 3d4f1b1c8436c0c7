"""Tokenizer, image processor, chat template and processor of a base, without its weights.

When plain transformers loads the saved processor, it must tokenise and resize as training does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PilBackend,
)

from llava_accel.data.tiling import Tiling
from llava_accel.exceptions import UserError
from llava_accel.families.family import TowerConfig, num_class_tokens
from llava_accel.model.bases import Base, find_base
from llava_accel.model.chat_template import choose_template
from llava_accel.model.files import first_line
from llava_accel.model.limits import check_pixels
from llava_accel.model.tokenizer import IMAGE_TOKEN, allow_tokens, load_tokenizer, refuse_tokens_without_rows
from llava_accel.model.trial import check_texts
from llava_accel.recipe import ModelTable

ROWS_MULTIPLE = 64
"""Embedding matrices grow to a multiple of this, which makes matrix kernels fast."""


@dataclass(frozen=True, slots=True)
class Processing:
    """All that turns records into inputs, and the sizes that the inputs need in the model.

    `processor` turns one image or tile into the tower's input. `image_aspect` is "tiles", or how an image becomes a square.
    `vocab_size` is the number of `lm_head` rows that take part in the softmax, `num_rows` that of all rows.
    `words` are the added tokens that a text may hold, `notes` lines for the console.
    """

    processor: LlavaProcessor
    tiling: Tiling
    image_aspect: str
    image_token_id: int
    vocab_size: int
    num_rows: int
    base: Base
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def square_aspect(self) -> str:
        """How an image that is not cut becomes a square: where others are cut, it is padded, as in LLaVA's own code."""
        return "pad" if self.image_aspect == "tiles" else self.image_aspect

    @property
    def added_ids(self) -> list[int]:
        """Ids that the model must never write: rows after the vocabulary, and the image token in a spare row."""
        return sorted({self.image_token_id, *range(self.vocab_size, self.num_rows)})


def load_processing(model: ModelTable, image_aspect: str) -> Processing:
    """Load everything but the weights, which are not even downloaded.

    Args:
        model: The recipe's [model].
        image_aspect: `data.image_aspect`; the saved processor cuts, pads, crops or stretches by itself as training does.

    Raises:
        UserError: a part is missing, or parts do not fit together.
    """
    base = find_base(model, weights=False)
    check_texts(base)
    tokenizer, notes = load_tokenizer(base)
    if base.layout == "hub":
        token = tokenizer.convert_ids_to_tokens(base.config.image_token_index)
        if not isinstance(token, str):
            raise UserError(
                f"{base.folder}: image_token_index is {base.config.image_token_index}, and the tokenizer has no such "
                "token. Copy tokenizer and config from the same model"
            )
    else:
        token = IMAGE_TOKEN
    image_token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(image_token_id, int)
    vision, on_disk = base.vision, base.text.vocab_size
    # A model that was merged from a grown one remembers how many rows were its own.
    vocab_size = base.config.to_dict().get("scored_vocab_size") or on_disk
    words = allow_tokens(tokenizer, model.added_tokens, token)
    refuse_tokens_without_rows(tokenizer, base, vocab_size)
    aspect = base.image_aspect(image_aspect)
    tiling = base.family.tiling(base.config, aspect)
    template, more = choose_template(model.template, base.folder, tokenizer)
    processor = LlavaProcessor(
        image_processor=load_image_processor(base.tower or base.folder, vision, aspect),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        num_additional_image_tokens=num_class_tokens(vision),
        vision_feature_select_strategy=base.config.vision_feature_select_strategy,
        chat_template=template,
        image_token=token,
    )
    return Processing(
        processor=processor,
        tiling=tiling,
        image_aspect=aspect,
        image_token_id=image_token_id,
        vocab_size=vocab_size,
        num_rows=num_rows(on_disk, 0 if base.layout == "hub" else len(tokenizer)),
        base=base,
        words=words,
        notes=(*notes, *more),
    )


def num_rows(on_disk: int, num_tokens: int) -> int:
    """Number of rows with which the embedding has one for every token: those on disk, or the next multiple of 64."""
    return on_disk if num_tokens <= on_disk else -(-num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE


def load_image_processor(folder: Path, vision: TowerConfig, image_aspect: str) -> PilBackend:
    """The tower's image processor, in its PIL form, doing by itself what `image_aspect` says; UserError if it makes
    images of another size than the tower takes."""
    side = int(vision.image_size)  # pyright: ignore[reportArgumentType]  a number in every CLIP and SigLIP
    square: Any = {"height": side, "width": side}
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        try:
            loaded = CLIPImageProcessorPil.from_pretrained(folder)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(
                f"{folder} has no image processor that can be loaded ({first_line(error)}). "
                "Copy preprocessor_config.json or processor_config.json once more"
            ) from error
    elif isinstance(vision, CLIPVisionConfig):
        loaded = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    else:
        half = [0.5] * 3  # SigLIP's mean and deviation
        loaded = CLIPImageProcessorPil(size=square, do_center_crop=False, image_mean=half, image_std=half)
    settings: dict[str, Any] = {key: value for key, value in loaded.to_dict().items() if key in _SETTINGS}
    check_pixels(settings, folder)
    if "height" in settings["size"]:  # SigLIP's: the image is stretched, and its file says nothing about a crop
        settings["do_center_crop"] = False
    made = settings["crop_size"] if settings["do_center_crop"] else settings["size"]
    if set(made.values()) != {side}:
        raise UserError(
            f"{folder}: the image processor makes images of {made}, and the vision tower takes {side} x {side} px. "
            "Use the preprocessor_config.json that belongs to the tower"
        )
    if image_aspect == "pad":
        return LlavaImageProcessorPil(**settings, do_pad=True)
    if image_aspect in ("stretch", "tiles"):
        return CLIPImageProcessorPil(**settings | {"size": square, "crop_size": square, "do_center_crop": False})
    assert image_aspect == "crop", image_aspect
    crop = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
    return CLIPImageProcessorPil(**settings | crop)


_SETTINGS = {
    "size", "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize",
    "image_mean", "image_std", "resample", "rescale_factor",
}  # fmt: skip
