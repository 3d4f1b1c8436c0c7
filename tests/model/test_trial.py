"""Tokenizers and chat templates that would take for ever or all memory end in a process of their own, and soon."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.tiny import make_tokenizer
from llava_accel.exceptions import UserError
from llava_accel.model import trial
from llava_accel.model.trial import check_template, check_tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))"
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_SECONDS", 1)


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """As in a run, whose handlers are not for what is tried."""

    def asked(*_: object) -> None:
        raise SystemExit

    before = signal.signal(signal.SIGXCPU, asked)
    yield
    signal.signal(signal.SIGXCPU, before)


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(parts)}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def written(folder: Path, tokenizer: PreTrainedTokenizerFast, **parts: Any) -> Path:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(spec | parts))
    return folder / "tokenizer.json"


WORD = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
BOMBS: dict[str, dict[str, Any]] = {
    "nested repeats": {"pre_tokenizer": split("(a+)+$")},
    "words of words": {"pre_tokenizer": split(r"(\w+\s?)+$")},
    "repeats in a normalizer": {"normalizer": replace("(a+)+$", "b", "Regex")},
    "a sign of a doubled sign": {"normalizer": sequence(*[replace("a", "aa")] * 60)},
    "nothing becomes something": {"normalizer": sequence(*[replace("", "xx", "Regex")] * 40)},
    "a space of a million": {"normalizer": replace(" ", "x" * 10**6)},
    "a long beginning": {"normalizer": sequence(*[{"type": "Prepend", "prepend": "x" * 10**5}] * 20)},
    "a decoder that doubles": {"decoder": {"type": "Sequence", "decoders": [replace("a", "aa")] * 60}},
    "a charsmap of no length": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "too many tokens": {"added_tokens": [WORD | {"id": number, "content": f"q{number}"} for number in range(40_000)]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_tokenizer_that_blows_up_is_refused_with_its_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    file, start = written(tmp_path, tokenizer, **BOMBS[name]), time.monotonic()
    with pytest.raises(UserError, match=r"tokenizer\.json (takes|writes|crashes|has more).*Download it again"):
        check_tokenizer(file)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"pre_tokenizer": split(GPT2)},
        {"pre_tokenizer": split(LLAMA3)},
        {"pre_tokenizer": split(DIGITS)},
        {"normalizer": sequence({"type": "NFKC"}, replace(" {2,}", " ", "Regex"), replace(" ", "▁"))},
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "<unk>"}},
    ],
)  # fmt: skip
def test_tokenizers_that_mean_well_pass_and_cost_little(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, parts: dict[str, Any]
) -> None:
    file, start = written(tmp_path, tokenizer, **parts), time.process_time()
    check_tokenizer(file)
    assert time.process_time() - start < 0.3


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 1 s"),
        ("{{ 10 ** (10 ** 10) }}", "takes more than 1 s"),
        ("{{ 'a' * 10 ** 11 }}", "2 GiB of memory"),
        ("{{ '%09999999999d' % 1 }}", "2 GiB of memory"),
        (
            "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "takes more than",
        ),
        ("{% for i in x %}" * 60 + "{% endfor %}" * 60, "cannot be read"),
        (CHAT + "{% if add_generation_prompt %}{{ 'a' * 10 ** 11 }}{% endif %}", "2 GiB of memory"),
        (CHAT + "{% if messages | length > 12 %}{{ 'a' * 10 ** 11 }}{% endif %}", "2 GiB of memory"),
        ("{{ 'a' * 10 ** 7 }}" + CHAT, "(writes far more than it is given|takes more)"),
    ],
)
def test_a_template_that_blows_up_is_refused(tokenizer: PreTrainedTokenizerFast, template: str, says: str) -> None:
    with pytest.raises(UserError, match=rf"model\.template: .*here.*{says}.*Name one of LLaVA's"):
        check_template(tokenizer, template, Path("here"))


@pytest.mark.parametrize("template", [CHAT, "{{ raise_exception('no') }}", "{% for", "{{ [].__class__ }}"])
def test_what_a_template_says_itself_is_left_to_those_who_use_it(
    tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    check_template(tokenizer, template, Path("here"))


def test_a_tokenizer_that_leaves_nothing_of_a_text_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    check_tokenizer(written(tmp_path, tokenizer))
    file = written(tmp_path, tokenizer, post_processor=spec["post_processor"] | {"single": []})
    with pytest.raises(UserError, match="makes no tokens from a text"):
        check_tokenizer(file)
