"""Tiny models that tests make for themselves: seeded, fp32, images of 56 px, sizes that 4 bits can pack."""

import io
import json
import shutil
from pathlib import Path

import sentencepiece
import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

IMAGE_PX, PATCH_PX, NUM_PATCHES = 56, 14, 16
WIDTH = 64
VOCABULARY = 383
"""Tokens of the text-only tokenizer; a LLaVA of the hub's layout has `<image>` as one more, and 384 rows."""

TEXT = """A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:
The assistant gives helpful, detailed, and polite answers to the user's questions.
What is in the image? What colour is the square? How many circles are there? Is it red or blue?
A red square. A blue circle on the left of a green triangle. Two yellow circles. There are three of them. Yes. No.
Describe the image in one sentence. The image shows a large black square above a small white circle."""


def make_tokenizer(folder: Path, legacy: bool = False) -> LlamaTokenizer:
    """A byte-pair Llama tokenizer of `VOCABULARY` tokens, as tokenizer.model with its config."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=True,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=legacy, pad_token="<unk>", padding_side="right")
    tokenizer.init_kwargs["legacy"] = legacy
    assert len(tokenizer) == VOCABULARY
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_language_model(folder: Path, seed: int = 0, *, tied: bool = False) -> Path:
    """A text-only LlamaForCausalLM of two layers with `VOCABULARY` rows, and its tokenizer."""
    make_tokenizer(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(_language_model(VOCABULARY, tied=tied)).save_pretrained(folder)
    return folder


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP vision tower of two layers with its image processor."""
    torch.manual_seed(seed)
    CLIPVisionModel(_clip()).save_pretrained(folder)
    _clip_processor().save_pretrained(folder)
    return folder


def make_siglip(folder: Path, seed: int = 0) -> Path:
    """A SigLIP vision tower of two layers with its image processor."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": IMAGE_PX, "width": IMAGE_PX}).save_pretrained(folder)
    return folder


def make_llava(folder: Path, seed: int = 0, *, biases: bool = False) -> Path:
    """A LLaVA in the hub's layout with its processor. `biases` gives the attention layers biases, as Qwen has."""
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image_token_id, int) and image_token_id == VOCABULARY
    LlavaProcessor(
        image_processor=_clip_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template="{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }} {% endfor %}",
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=_clip(),
        text_config=_language_model(VOCABULARY + 1, biases=biases),
        image_token_index=image_token_id,
        image_seq_length=NUM_PATCHES,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # biases start as zeros, which would hide one that gets lost
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def task_base(folder: Path, base: Path) -> Path:
    """A base whose tokenizer has special tokens for a task."""
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    for number, name in enumerate(("<box>", "<loc_1>", "<loc_2>"), start=100):  # rows that the model has
        token = next(token for token, id in spec["model"]["vocab"].items() if id == number)
        del spec["model"]["vocab"][token]
        spec["model"]["vocab"][name] = number
        spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if token not in (*pair, "".join(pair))]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": number, "content": name, "special": True, **flags})
    path.write_text(json.dumps(spec))
    assert tokenizer.unk_token == "<unk>"
    return folder


def _language_model(rows: int, *, tied: bool = False, biases: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        attention_bias=biases,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        projection_dim=WIDTH,
    )


def _clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_PX}, crop_size={"height": IMAGE_PX, "width": IMAGE_PX})
