"""The chat template that is saved with a model: one of LLaVA's by name, or the base's own."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llava_accel.data.conversation import SYSTEM_PROMPTS
from llava_accel.data.jinja_template import REFUSALS, with_ends
from llava_accel.data.text_encoder import spaces_of
from llava_accel.exceptions import UserError
from llava_accel.model.files import read_json, read_text
from llava_accel.model.trial import check_template

_TEMPLATES = Path(__file__).parent / "templates"
_QUESTION = "question"


def choose_template(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[str | None, list[str]]:
    """The chat template that `model.template` means for the base in a folder, and lines for the user.

    "auto" is the base's own, with an end token added to answers that lack one; None if the base has no template.

    Raises:
        UserError: the base's own is to be used, and rendering it takes too much time or memory.
    """
    own = _own_template(folder, tokenizer)
    if name == "auto":
        if own:
            check_template(tokenizer, own, folder)
        return _ended(tokenizer, own)
    template = chat_template(name, spaces_of(tokenizer) == (True, False))
    return template, [] if name == "plain" or not own else _other_template(tokenizer, own, folder, template, name)


def _own_template(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The chat template of a folder, wherever this or an older version of transformers keeps it."""
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            template = read_text(path) if path.suffix == ".jinja" else read_json(path).get("chat_template")
            if isinstance(template, str):
                return template
    named: Any = tokenizer.chat_template  # several are a dict, by name
    template = named.get("default") if isinstance(named, dict) else named
    return template if isinstance(template, str) else None


def _ended(tokenizer: PreTrainedTokenizerFast, own: str | None) -> tuple[str | None, list[str]]:
    """The base's own chat template with an end token after each answer, and a line for the user if that was added.

    A template that cannot be used is returned as it is: rendering it later says what is wrong.
    """
    try:
        template = with_ends(tokenizer, own) if own else None
    except UserError:
        return own, []
    if template == own:
        return own, []
    end = tokenizer.eos_token
    return template, [
        f"note: the base's chat template has no token at the end of an answer, so {end!r} is added, in exports too"
    ]


def _other_template(tokenizer: PreTrainedTokenizerFast, own: str, folder: Path, used: str, name: str) -> list[str]:
    """A line for the user if the base's own chat template puts other words before an answer than the one that is used;
    none if it cannot be rendered."""
    try:
        check_template(tokenizer, own, folder)
    except UserError:
        return []
    theirs, ours = _before_answers(tokenizer, own), _before_answers(tokenizer, used)
    if theirs is None or ours is None or theirs.endswith(ours) or ours.endswith(theirs):
        return []
    return [
        f"note: the base has a chat template of its own, in which {theirs!r} comes before an answer. model.template = "
        f'{name!r} has {ours!r}. Set model.template = "auto" if the base was trained with its own'
    ]


def _before_answers(tokenizer: PreTrainedTokenizerFast, template: str) -> str | None:
    """The last word between a question and its answer; None if there is none, or the template cannot be rendered."""
    for content in (_QUESTION, [{"type": "text", "text": _QUESTION}]):
        messages: Any = [{"role": "user", "content": content}]
        try:
            prompt = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except REFUSALS:
            continue
        return next(reversed(str(prompt).rpartition(_QUESTION)[2].split()), None)
    return None


def chat_template(name: str, space_after_image: bool) -> str:
    """LLaVA's template of that name, as one line. In v1 and the [INST] ones a user's turn ends in the generation prompt.

    Args:
        name: A value of `model.template`.
        space_after_image: True writes a space after each image. Training encodes the text there on its own, and a
            SentencePiece tokenizer puts a space before a text, but some put none after special tokens.
    """
    last = {"llava_v1": "v1", "llava_llama_2": "inst", "mistral_instruct": "inst", "qwen_1_5": "chatml"}.get(name, name)
    parts = ("text_of", "plain") if name == "plain" else ("text_of", "system", last)
    lines = [line for part in parts for line in (_TEMPLATES / f"{part}.jinja").read_text().splitlines()]
    template = "".join(map(str.strip, lines))
    template = template.replace("DEFAULT", repr(SYSTEM_PROMPTS[name]))
    template = template.replace("BETWEEN", {"llava_llama_2": "<s>", "qwen_1_5": "\\n"}.get(name, ""))
    return template.replace("IMAGE", "<image> " if space_after_image else "<image>")
