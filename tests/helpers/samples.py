"""Tokenizers, records and corpora for the tests of the data room."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import Encoder
from llava_accel.data.images import find_image
from llava_accel.data.labels import Example
from llava_accel.data.records import parse_record
from llava_accel.data.row_forms import RowForm
from llava_accel.data.tiling import Tiling
from llava_accel.sources.named import Named

PARITY = Path(__file__).parents[1] / "parity"
IMAGE_ID = 31_999
NUM_IMAGE_TOKENS = 4

SPELLED_OUT = ["</s>", "<s>", "<unk>", "<image>", "<|im_end|>", "<|im_start|>", "[INST]", "<0x0A>"]
TRICKY = [
    *SPELLED_OUT,
    "a </s> b",
    "yes ASSISTANT: no",
    "USER: who?",
    "3",
    "12 of 345",
    "🙂",
    "你好世界",
    "  led in by spaces",
    "\nled in by a line",
    "ends in spaces  ",
    "ends in a line\n",
    " ",
    "\t\r\n\x00",
]
# In the form of llava-hf's: no system prompt, no end token, images first, a space behind every text.
LLAVA = (
    "{% for m in messages %}"
    "{% if m['role'] != 'system' %}{{ m['role'] | upper }}: {% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# ChatML as language models write it: one string a message.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# And as vision models do: parts, the images where they stand.
CHATML_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SENTENCES = [
    "What is in the image? A red square, and two blue circles.",
    "Answer the questions. The assistant answers in a word or a phrase.",
    "How many cats are there? Three. Is the third one black? No, it is white.",
]


texts = st.one_of(
    st.sampled_from(TRICKY),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=12),  # ▁ is a space to Llama
    st.lists(st.sampled_from([*TRICKY, " ", "\n", "a", "The cat"]), max_size=4).map("".join),
).filter(lambda text: "▁" not in text)
rounds = st.lists(st.tuples(texts.map(lambda text: text.replace("<image>", "")), texts), min_size=1, max_size=4)
"""Questions and answers; no question holds an image."""


@cache
def llama(legacy: bool = True) -> LlamaTokenizer:
    """The SentencePiece tokenizer of the parity base."""
    return LlamaTokenizer.from_pretrained(PARITY / "llava-orig", legacy=legacy)


@cache
def byte_level(add_prefix_space: bool = False, special: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's tokens and no BOS, as Qwen's; `special` is how it marks the tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_SENTENCES, trainer)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    if special:
        backend.add_special_tokens(tokens)
    else:
        backend.add_tokens(tokens)
    # Only eos is declared: what else is special is left to the backend.
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


@cache
def llama_3() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer with Llama 3's special tokens, which puts its BOS before a text by itself."""
    return PreTrainedTokenizerFast.from_pretrained(PARITY / "next" / "llama3-tokenizer")


def fitting(template: str, legacy: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer that has the tokens of a template; `legacy` counts where it is Llama's."""
    if template == "llava_llama_3":
        return llama_3()
    return byte_level() if template in ("chatml", "qwen_1_5", "auto") else llama(legacy)


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends answers."""
    token_id = tokenizer.eos_token_id
    assert isinstance(token_id, int)
    return token_id


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's own processor for 56 px."""
    return CLIPImageProcessorPil.from_pretrained(PARITY / "clip")


@cache
def encoder(tokenizer: PreTrainedTokenizerFast | None = None, template: str = "v1", **settings: Any) -> Encoder:
    """An encoder whose images take four tokens."""
    return Encoder(tokenizer or llama(), IMAGE_ID, Tiling(56, NUM_IMAGE_TOKENS), template=template, **settings)


def record(*texts: str, **fields: object) -> dict[str, object]:
    """A record of alternating questions and answers."""
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"conversations": turns} | fields


def write_lines(path: Path, records: Sequence[object]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def write_images(folder: Path, *names: str) -> None:
    """A small image of its own colour for each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + 3 * number, 30), (30 * number % 256, 90, 200)).save(folder / name)


def corpus(folder: Path, records: Sequence[object], form: RowForm | None = None, **settings: Any) -> Corpus:
    """A corpus of one .jsonl file, with its images beside it."""
    return corpus_of(write_lines(folder / "data.jsonl", records), form, **settings)


def corpus_of(path: Path, form: RowForm | None = None, **settings: Any) -> Corpus:
    """A corpus of a file that is there."""
    return Corpus(open_sources([Named(str(path))], path.parent / "cache"), encoder(**settings), form or RowForm())


def image_in(folder: Path) -> Callable[[str], str]:
    """Where images of a folder are, as encoders ask."""
    return lambda name: str(find_image(folder, name))


def encode(encode_record: Encoder, fields: dict[str, object], folder: Path = PARITY / "images") -> Example:
    """One record through parsing, template and labels."""
    return encode_record(parse_record(json.dumps(fields).encode(), 1), 0, image_in(folder)).example


def spans(example: Example) -> list[list[int]]:
    """The stretches of targets."""
    edges = np.flatnonzero(np.diff(example.is_target, prepend=False, append=False))
    return [example.input_ids[start:end].tolist() for start, end in edges.reshape(-1, 2)]
