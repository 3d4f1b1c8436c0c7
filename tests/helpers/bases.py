"""Tiny bases of every kind: each tower in each layout with each language model and each sort of tokenizer."""

import json
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from helpers.tiny import IMAGE_PX, PATCH_PX, TEXT, WIDTH, make_clip, make_siglip, make_tokenizer
from llava_accel.model import layouts

TOWERS = ("clip", "siglip")
LAYOUTS = ("hub", "original", "parts")
LANGUAGE_MODELS = ("llama", "mistral", "qwen", "llama3")
TOKENIZERS = ("sentencepiece", "byte", "unigram")
_ORIGINAL = {"llama": "llava_llama", "mistral": "llava_mistral", "llama3": "llava_llama"}
_ROPE = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


class Kind(NamedTuple):
    """One of them."""

    tower: str
    layout: str
    language_model: str
    tokenizer: str

    @property
    def is_possible(self) -> bool:
        """Whether there are models of this kind: LLaVA's own code has Llama and Mistral alone."""
        return self.layout != "original" or self.language_model in _ORIGINAL

    @property
    def template(self) -> str:
        """The conversation template that this tokenizer can write."""
        if self.tokenizer == "byte":
            return "qwen_1_5" if self.language_model == "qwen" else "chatml"
        return "v1"

    def forms(self) -> dict[str, str]:
        """Every form of export, with what it says where this kind has no such form, else nothing."""
        no_adapter = "is not one folder" if self.layout == "parts" else ""
        # A tower that has a name is left where it is.
        no_llava = "one SigLIP tower" if self.tower == "siglip" and self.layout == "hub" else ""
        return {"peft": no_adapter, "merged": "", "llava": no_llava}


def every_kind() -> list[Kind]:
    """All that are possible."""
    kinds = (Kind(*each) for each in product(TOWERS, LAYOUTS, LANGUAGE_MODELS, TOKENIZERS))
    return [kind for kind in kinds if kind.is_possible]


def pairwise_kinds() -> list[Kind]:
    """Few of them, among which every possible pair of two values occurs."""
    kinds, chosen = every_kind(), list[Kind]()
    open_pairs = set().union(*(_pairs(kind) for kind in kinds))
    while open_pairs:
        best = max(kinds, key=lambda kind: len(_pairs(kind) & open_pairs))
        chosen.append(best)
        open_pairs -= _pairs(best)
    return chosen


def _pairs(kind: Kind) -> set[tuple[tuple[str, str], ...]]:
    return set(combinations(zip(kind._fields, kind, strict=True), 2))


def make_base(folder: Path, kind: Kind) -> dict[str, Any]:
    """Write a base of this kind; returns the keys of [model] that name it."""
    folder.mkdir()
    tower = folder / "tower"
    (make_clip if kind.tower == "clip" else make_siglip)(tower)
    place = folder / "base"
    tokenizer = _tokenizer(place, kind.tokenizer)
    template = {"template": kind.template}
    text = _text_config(kind.language_model, tokenizer, len(tokenizer) + (kind.layout == "hub"))
    torch.manual_seed(1)
    if kind.layout == "parts":
        AutoModelForCausalLM.from_config(text).save_pretrained(place)
        return {"language_model": str(place), "vision_tower": str(tower), **template}
    model = LlavaForConditionalGeneration(_llava_config(kind, text, len(tokenizer)))
    if kind.layout == "hub":
        model.save_pretrained(place)
        _save_processor(place, kind, tokenizer)
    else:
        _save_original(place, kind, model, text)
    return {"base": str(place), **template}


def _text_config(name: str, tokenizer: PreTrainedTokenizerFast, rows: int) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": rows, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    if name == "mistral":
        return MistralConfig(**sizes, sliding_window=None)
    if name == "qwen":
        return Qwen2Config(**sizes, tie_word_embeddings=True)
    return (
        LlamaConfig(**sizes, rope_parameters={"rope_theta": 5e5, **_ROPE}) if name == "llama3" else LlamaConfig(**sizes)
    )


def _llava_config(kind: Kind, text: Any, image_token_id: int) -> LlavaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": IMAGE_PX, "patch_size": PATCH_PX,
    }  # fmt: skip
    is_clip = kind.tower == "clip"
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, projection_dim=WIDTH) if is_clip else SiglipVisionConfig(**sizes),
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=(IMAGE_PX // PATCH_PX) ** 2,
        vision_feature_select_strategy="default" if is_clip else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )


def _save_processor(place: Path, kind: Kind, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    square = {"height": IMAGE_PX, "width": IMAGE_PX}
    is_clip = kind.tower == "clip"
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=is_clip),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        num_additional_image_tokens=int(is_clip),
        vision_feature_select_strategy="default" if is_clip else "full",
    ).save_pretrained(place)


def _save_original(place: Path, kind: Kind, model: LlavaForConditionalGeneration, text: Any) -> None:
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(layouts.TOWER)}
    save_file(
        {layouts.to_original(name): tensor.contiguous() for name, tensor in kept.items()}, place / "model.safetensors"
    )
    config = {key: value for key, value in text.to_dict().items() if not key.startswith("rope")}
    rope = {"rope_theta": 5e5, "rope_scaling": _ROPE} if kind.language_model == "llama3" else {"rope_theta": 1e4}
    own = {
        "model_type": _ORIGINAL[kind.language_model], "mm_vision_tower": str(place.parent / "tower"),
        "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": WIDTH, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config | rope | own))


def _tokenizer(place: Path, sort: str) -> PreTrainedTokenizerFast:
    if sort == "sentencepiece":
        return make_tokenizer(place)
    made = _byte_bpe() if sort == "byte" else _unigram()
    made.save_pretrained(place)
    return made


def _byte_bpe() -> PreTrainedTokenizerFast:
    """As Qwen's and Llama 3's: bytes, and special tokens that ChatML is written with."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=383, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _unigram() -> PreTrainedTokenizerFast:
    """As T5's and those of some Llama-like models: pieces with probabilities, a mark for each space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    letters = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    trainer = trainers.UnigramTrainer(
        vocab_size=256, special_tokens=special, unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
