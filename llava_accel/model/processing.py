"""Tokenizer, image processor, chat template and processor of a base, without its weights.

Plain transformers must tokenise and resize as training does when it loads what is saved of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaTokenizer,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PilBackend,
    PreTrainedTokenizerFast,
)

from llava_accel import compat
from llava_accel.data.conversation import SYSTEM_PROMPTS
from llava_accel.data.text_encoder import TextEncoder
from llava_accel.exceptions import UserError
from llava_accel.model.bases import Base, TowerConfig, find_base, num_class_tokens, num_patches
from llava_accel.model.files import first_line, read_json
from llava_accel.recipe import ModelTable

IMAGE_TOKEN = "<image>"
_TEMPLATES = Path(__file__).parent / "templates"
ROWS_MULTIPLE = 64
"""Embedding matrices grow to a multiple of this, which makes matrix kernels fast."""


@dataclass(frozen=True, slots=True)
class Processing:
    """All that turns records into inputs, and what the inputs demand of the model.

    `vocab_size` is the number of `lm_head` rows that take part in the softmax, `num_rows` the number that there are.
    """

    processor: LlavaProcessor
    num_image_tokens: int
    image_token_id: int
    vocab_size: int
    num_rows: int
    base: Base

    @property
    def added_ids(self) -> list[int]:
        """Ids that the model must never write: rows after the vocabulary, and the image token in a spare row."""
        return sorted({self.image_token_id, *range(self.vocab_size, self.num_rows)})


def load_processing(model: ModelTable, image_aspect: str) -> Processing:
    """Load everything but the weights; of a hub model they are not even downloaded.

    Args:
        model: The recipe's [model].
        image_aspect: `data.image_aspect`; the saved processor pads, crops or stretches by itself as training does.

    Raises:
        UserError: a part is missing, or parts do not fit together.
    """
    base = find_base(model, weights=False)
    tokenizer = load_tokenizer(base)
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
    if model.template == "auto":
        template = _own_template(base.folder, tokenizer)
    else:
        encoder = TextEncoder(tokenizer)
        template = chat_template(model.template, encoder.space_at_start and not encoder.space_after_special)
    processor = LlavaProcessor(
        image_processor=load_image_processor(base.tower or base.folder, vision, image_aspect),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        num_additional_image_tokens=num_class_tokens(vision),
        vision_feature_select_strategy=base.config.vision_feature_select_strategy,
        chat_template=template,
        image_token=token,
    )
    dropped = 1 if base.config.vision_feature_select_strategy == "default" else 0
    return Processing(
        processor=processor,
        num_image_tokens=num_patches(vision) + num_class_tokens(vision) - dropped,
        image_token_id=image_token_id,
        # A model that was merged from a grown one remembers how many rows were its own.
        vocab_size=base.config.to_dict().get("scored_vocab_size", on_disk),
        num_rows=num_rows(on_disk, 0 if base.layout == "hub" else len(tokenizer)),
        base=base,
    )


def num_rows(on_disk: int, num_tokens: int) -> int:
    """Rows of the embedding matrix that hold every token: those on disk, or the next multiple of 64."""
    return on_disk if num_tokens <= on_disk else -(-num_tokens // ROWS_MULTIPLE) * ROWS_MULTIPLE


def load_tokenizer(base: Base) -> PreTrainedTokenizerFast:
    """The tokenizer of a base, padding on the right, with an image token and a pad token; UserError if transformers
    itself cannot load one."""
    kwargs: dict[str, object] = {}
    path = base.folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if base.layout != "hub":
        kwargs["extra_special_tokens"] = {"image_token": IMAGE_TOKEN}
        if "legacy" not in config and str(config.get("tokenizer_class", "Llama")).startswith("Llama"):
            # LLaVA trains with transformers 4, where a missing flag means true; in transformers 5 it means false.
            kwargs["legacy"] = True
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, config=base.text, trust_remote_code=False, padding_side="right", **kwargs
        )
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
        raise UserError(
            f"{base.folder} has no tokenizer that can be loaded ({first_line(error)}). "
            "Copy the files of the tokenizer (tokenizer.json or tokenizer.model, tokenizer_config.json) once more"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if isinstance(tokenizer, LlamaTokenizer):
        compat.save_legacy_flag(tokenizer)
    return tokenizer


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
    if image_aspect == "stretch":
        return CLIPImageProcessorPil(**settings | {"size": square, "do_center_crop": False})
    assert image_aspect == "crop", image_aspect
    crop = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
    return CLIPImageProcessorPil(**settings | crop)


_SETTINGS = {
    "size", "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize",
    "image_mean", "image_std", "resample", "rescale_factor",
}  # fmt: skip


def _own_template(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template of a folder, wherever this or an older version of transformers keeps it."""
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            template = path.read_text() if path.suffix == ".jinja" else read_json(path).get("chat_template")
            if isinstance(template, str):
                return template
    return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None


def chat_template(name: str, space_after_image: bool) -> str:
    """The template of that name, as one line. In v1 and the [INST] ones a user's turn ends in the generation prompt.

    Args:
        name: Of `model.template`.
        space_after_image: Training begins a new text after an image, before which a SentencePiece tokenizer puts a
            space. True writes it out, for tokenizers that put none after special tokens.
    """
    parts = {
        "plain": ["text_of", "plain"],
        "llava_llama_2": ["text_of", "system", "inst"],
        "mistral_instruct": ["text_of", "system", "inst"],
    }.get(name, ["text_of", "system", name])
    lines = [line for part in parts for line in (_TEMPLATES / f"{part}.jinja").read_text().splitlines()]
    template = "".join(map(str.strip, lines))
    template = template.replace("DEFAULT", repr(SYSTEM_PROMPTS[name]))
    template = template.replace("BETWEEN", "<s>" if name == "llava_llama_2" else "")
    return template.replace("IMAGE", "<image> " if space_after_image else "<image>")
