"""The tokenizer of a base, from tokenizer.json or tokenizer.model, and which of its tokens texts may hold."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_accel import compat
from llava_accel.data.text_encoder import TextEncoder, parts_of
from llava_accel.exceptions import UserError
from llava_accel.model.bases import Base
from llava_accel.model.files import first_line, read_json, read_text
from llava_accel.model.sentencepiece_file import PROBES, SentencePieceFile, read_sentencepiece

IMAGE_TOKEN = "<image>"
_STRUCTURE = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")


def load_tokenizer(base: Base) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """The tokenizer of a base, padding on the right, with an image token and a pad token.

    If a folder has both files, tokenizer.json is read, as by transformers; in LLaVA's own layout tokenizer.model, as by
    LLaVA's own code.

    Returns:
        The tokenizer, and lines for the user.

    Raises:
        UserError: transformers itself cannot load one.
    """
    kwargs: dict[str, object] = {}
    path = base.folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    # LLaVA trains with transformers 4, where a missing flag means true; in transformers 5 it means false.
    legacy = bool(config.get("legacy", base.layout != "hub"))
    if base.layout != "hub":
        kwargs["extra_special_tokens"] = {"image_token": IMAGE_TOKEN}
    if str(config.get("tokenizer_class", "Llama")).startswith("Llama"):
        kwargs |= {} if base.layout == "hub" else {"legacy": legacy}
        if not (base.folder / "tokenizer.json").is_file():  # whose post-processor would decide it
            kwargs["add_bos_token"] = config.get("add_bos_token", True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.folder, config=base.text, trust_remote_code=False, padding_side="right", **kwargs
        )
        has_json = isinstance(tokenizer, PreTrainedTokenizerFast) and (base.folder / "tokenizer.json").is_file()
        notes = _read_as_written(tokenizer, base.folder, config) if has_json else []
    except Exception as error:  # tokenizers raises a bare Exception for a file that it cannot read
        raise UserError(
            f"{base.folder} has no tokenizer that can be loaded ({first_line(error)}). Copy the files of the tokenizer "
            "(tokenizer.json or tokenizer.model, tokenizer_config.json) once more. If only the tokenizer_class there is "
            'wrong, write "PreTrainedTokenizerFast", which takes tokenizer.json as it is'
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    file = read_sentencepiece(base.folder)
    if file is None or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer, notes
    return tokenizer, notes + _read_model_file(tokenizer, file, base, legacy, config)


def _read_as_written(tokenizer: PreTrainedTokenizerFast, folder: Path, config: dict[str, Any]) -> list[str]:
    """Make the tokenizer give the ids of its tokenizer.json, the same on every call; returns lines for the user.

    transformers 5 takes only the vocabulary from that file and rebuilds the rest, by the class that
    tokenizer_config.json names; version 4, with which models were trained, takes the file as it is.
    """
    model, notes = compat.tokenizer_backend(tokenizer).model, list[str]()
    if getattr(model, "dropout", None):
        model.dropout = None
        notes.append(f"note: tokenizer.json of {folder} skips merges at random (dropout), which is not done here")
    if type(tokenizer) is PreTrainedTokenizerFast or config.get("add_prefix_space") is not None:
        return notes
    file = json.loads(read_text(folder / "tokenizer.json"))
    written = {key: file.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    settings = {key: value for key, value in file["model"].items() if key not in ("vocab", "merges", "dropout")}
    built, of_model = parts_of(tokenizer), {key: getattr(model, key, None) for key in settings}
    of_model["type"] = type(model).__name__
    if all(_is_part(built[key], part) for key, part in written.items()) and _is_part(of_model, settings):
        return notes
    if file["model"].get("dropout"):
        file["model"]["dropout"] = None
    used = TextEncoder(tokenizer)
    own = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(file))))
    differing = next((text for text in PROBES if used(text, "start") != own(text, "start")), None)
    if differing is None:
        return notes
    spec = json.loads(compat.tokenizer_backend(tokenizer).to_str())
    compat.replace_tokenizer(tokenizer, json.dumps(spec | written | {"model": file["model"]}))
    return [
        *notes,
        f"note: transformers 5 builds a {type(tokenizer).__name__} that differs from tokenizer.json of {folder}: it "
        f"gives {differing!r} other ids. tokenizer.json is used, as by transformers 4",
    ]


def _is_part(built: Any, written: Any) -> bool:
    """Whether a part of a tokenizer equals that of a file, which may leave out defaults."""
    if not isinstance(built, dict) or not isinstance(written, dict):
        return built == written
    return all(built.get(key) == value for key, value in written.items())


def _read_model_file(
    tokenizer: PreTrainedTokenizerFast, file: SentencePieceFile, base: Base, legacy: bool, config: dict[str, Any]
) -> list[str]:
    """Rebuild the tokenizer from tokenizer.model where that file counts; returns lines for the user on the two files."""
    has_json = (base.folder / "tokenizer.json").is_file()
    differing = file.differing(partial(TextEncoder(tokenizer), after="start")) if has_json else None
    spec = json.loads(compat.tokenizer_backend(tokenizer).to_str())
    is_used = not has_json or (base.layout == "original" and _has_pieces(spec["model"]["vocab"], file.pieces))
    if is_used:
        spaced = config.get("add_prefix_space") is not False
        file.describe(spec, always_spaced=legacy, spaced=spaced)
        compat.replace_tokenizer(tokenizer, json.dumps(spec))
    if not has_json:
        differing = file.differing(partial(TextEncoder(tokenizer), after="start"))
        problem = "tokenizer.model normalises texts in a way that tokenizer.json, which exports hold, cannot express"
        return [] if differing is None else [f"note: {base.folder}: {problem}: {differing!r} gets other ids"]
    if differing is None:
        return []
    used, who = ("tokenizer.model", "LLaVA's own code") if is_used else ("tokenizer.json", "transformers")
    return [
        f"note: tokenizer.json and tokenizer.model of {base.folder} disagree: they give {differing!r} different ids. "
        f"{used} is used, as by {who}; to use the other, move {used} out of the folder"
    ]


def _has_pieces(vocabulary: Any, pieces: list[str]) -> bool:
    """Whether a tokenizer.json's vocabulary (of any model but a Unigram's) has these ids; special tokens may be renamed."""
    if not isinstance(vocabulary, dict) or len(vocabulary) != len(pieces):
        return False
    return sum(vocabulary.get(piece) == id for id, piece in enumerate(pieces)) > 0.9 * len(pieces)


def refuse_tokens_without_rows(tokenizer: PreTrainedTokenizerFast, base: Base, num_rows: int) -> None:
    """UserError if a text can become a token that the embedding has no trained row for.

    Args:
        num_rows: Rows of the base's own embedding.
    """
    added = tokenizer.added_tokens_decoder
    beyond = {
        id: token
        for token, id in tokenizer.get_vocab().items()
        if id >= num_rows and not (id in added and added[id].special)
    }
    if beyond:
        first = min(beyond)
        raise UserError(
            f"{base.folder}: the tokenizer has {len(beyond)} tokens without a row in the embedding, such as "
            f"{beyond[first]!r}, which is token {first} of {num_rows:,} (0 to {num_rows - 1:,}). Take the tokenizer's "
            "files from the model itself. Or give the model the rows (in transformers: "
            f"model.resize_token_embeddings({max(beyond) + 1}), then save_pretrained), and train them with "
            'model.train = "full"'
        )


def allow_tokens(tokenizer: PreTrainedTokenizerFast, patterns: Sequence[str], image_token: str) -> tuple[str, ...]:
    """Let texts hold the added tokens that `model.added_tokens` names: they are parsed, and answers show them.

    Returns:
        The tokens.

    Raises:
        UserError: a pattern names no added token, or one that structures conversations.
    """
    added = sorted(tokenizer.get_added_vocab())
    structure = {image_token, *(tokenizer.special_tokens_map.get(f"{name}_token") for name in _STRUCTURE)}
    words: dict[str, None] = {}
    for pattern in patterns:
        matching = [token for token in added if fnmatchcase(token, pattern.replace("[", "[[]"))]
        if not matching:
            others = ", ".join(token for token in added if token not in structure) or "none"
            raise UserError(f"model.added_tokens: the tokenizer has no added token {pattern!r}. Choose of: {others}")
        if taken := sorted(structure.intersection(matching)):
            raise UserError(
                f"model.added_tokens: {pattern!r} names {', '.join(taken)}, which structures the conversation and so may "
                "not occur in texts. Name the other tokens one by one"
            )
        words |= dict.fromkeys(matching)
    if words:
        spec = json.loads(compat.tokenizer_backend(tokenizer).to_str())
        for token in spec["added_tokens"]:
            token["special"] &= token["content"] not in words
        compat.replace_tokenizer(tokenizer, json.dumps(spec))
    return tuple(words)
