"""`template = "auto"`: the pieces of a conversation from the processor's own chat template.

The template is rendered with marks in place of the users' texts. What is between the marks comes from the template,
may hold special tokens and is parsed; the users' texts never are.
"""

import re
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from llava_accel.data.conversation import BOS, EOS, IMAGE, TEMPLATES, Piece, Turn
from llava_accel.data.labels import adds_bos
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError, quoted

_MARK = "\ue000{}.{}\ue001"  # characters for private use: no template and no tokenizer gives them a meaning
_MARKS = re.compile("\ue000(\\d+)\\.(\\d+)\ue001")
_REMEDY = f"Name one of LLaVA's templates: {', '.join(TEMPLATES)}"
_PROBE = [Turn("user", "q"), Turn("assistant", "a")]

REFUSALS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""The exceptions of a template on a conversation that it was not written for, or in jinja2's sandbox."""

_ENDED = """
{%- set ended = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = message['content'] -%}
  {%- if message['role'] == 'assistant' and content is string -%}
    {%- set content = content + END -%}
  {%- elif message['role'] == 'assistant' and content and content[-1]['text'] is defined -%}
    {%- set content = content[:-1] + [dict(content[-1], text=content[-1]['text'] + END)] -%}
  {%- endif -%}
  {%- set ended.messages = ended.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = ended.messages -%}
"""

Message = dict[str, str | list[dict[str, str]]]


class ChatTemplate:
    """A callable like those in `conversation.TEMPLATES`.

    Supervised are each answer, the space before it, and the special token that ends it; if the template has no such
    token, the end-of-sequence token after the last answer, without which generation would never stop.

    Args:
        tokenizer: Renders the template and knows its special tokens.
        chat_template: The Jinja text.

    Raises:
        UserError: there is no template, or what it renders is not what generation with it would see.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> None:
        if not chat_template:
            raise UserError(
                "model.template: 'auto' uses the chat template of the base's processor, which has none. " + _REMEDY
            )
        self._tokenizer = tokenizer
        self._template = chat_template
        tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens, IMAGE}
        self._special = re.compile("|".join(map(re.escape, sorted(filter(str.strip, tokens), key=len, reverse=True))))
        # A BOS that the tokenizer does not add by itself is a token like any other, where the template writes it.
        names = ("bos", "eos") if adds_bos(tokenizer) else ("eos",)
        self._names = {tokenizer.special_tokens_map.get(f"{name}_token", ""): name for name in names}
        self._leads: dict[str, str] = {}
        self._takes_parts = True
        texts = [[turn.text] for turn in _PROBE]
        try:
            self._check_marks(self._render(self._messages(texts, _PROBE)), texts)
        except UserError:
            self._takes_parts = False  # like templates of language models, which take one string
        self(_PROBE, has_images=False)

    def __call__(self, turns: Sequence[Turn], has_images: bool) -> list[Piece]:
        """Pieces of checked turns (`conversation.check_turns`).

        Raises:
            DataError: the template refuses such a conversation. Without file and row.
            UserError: it drops or repeats a part, or its answers do not begin as in generation.
        """
        texts = [self._texts(turn, has_images) for turn in turns]
        messages = self._messages(texts, turns)
        rendered = self._render(messages)
        self._check_marks(rendered, texts)
        pieces: list[Piece] = []
        place, after_answer = 0, False
        for mark in _MARKS.finditer(rendered):
            number, part = int(mark[1]), int(mark[2])
            is_answer = turns[number].role == "assistant"
            between, place = rendered[place : mark.start()], mark.end()
            lead = self._lead(messages, number, between) if is_answer else ""
            between = between[: len(between) - len(lead)]
            pieces += self._after_answer(between) if after_answer else self._parse(between)
            text = lead + texts[number][part]
            pieces += [Piece("text", text, supervised=is_answer)] if text else []
            after_answer = is_answer
        end = self._after_answer(rendered[place:])
        last = [number for number, piece in enumerate(end) if piece.kind == "special" and piece.supervised]
        pieces += end[: last[0] + 1] if last else [EOS]
        if sum(piece.kind == "image" for piece in pieces) != sum(len(parts) - 1 for parts in texts):
            raise UserError(f"model.template: the chat template does not write {IMAGE} for each image. {_REMEDY}")
        return _joined(pieces if pieces[0] == BOS else [BOS, *pieces])

    def _texts(self, turn: Turn, has_images: bool) -> list[str]:
        """The texts around the images of a turn, one more than there are images."""
        if not has_images or turn.role != "user":
            return [turn.text]
        first, *rest = turn.text.split(IMAGE)
        texts = [first]
        for text in rest:
            # A template that takes images as parts writes the line break after leading ones by itself.
            leading = self._takes_parts and not any(texts)
            texts.append(text.removeprefix("\n") if leading else text)
        return texts

    def _messages(self, texts: Sequence[Sequence[str]], turns: Sequence[Turn]) -> list[Message]:
        messages: list[Message] = []
        for number, (turn, parts) in enumerate(zip(turns, texts, strict=True)):
            content: list[dict[str, str]] = []
            for part, text in enumerate(parts):
                content += [{"type": "image"}] if part else []
                content += [{"type": "text", "text": _MARK.format(number, part)}] if text or len(parts) == 1 else []
            joined = "".join(part.get("text", IMAGE) for part in content)
            messages.append({"role": turn.role, "content": content if self._takes_parts else joined})
        return messages

    def _render(self, messages: list[Message], generation: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,  # pyright: ignore[reportArgumentType]  # contents may be lists of parts
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation,
            )
        except REFUSALS as error:
            problem = f"the base's chat template refuses the conversation ({quoted(error)})"
            raise DataError("roles", problem, "Change its turns, or choose another model.template") from None
        assert isinstance(text, str)
        return text

    def _check_marks(self, rendered: str, texts: Sequence[Sequence[str]]) -> None:
        rendered_marks = [(int(number), int(part)) for number, part in _MARKS.findall(rendered)]
        wanted = [
            (number, part)
            for number, parts in enumerate(texts)
            for part, text in enumerate(parts)
            if text or len(parts) == 1
        ]
        if rendered_marks != wanted:
            raise UserError(f"model.template: the chat template drops, repeats or moves texts. {_REMEDY}")

    def _lead(self, messages: list[Message], number: int, between: str) -> str:
        """The text, mostly a space, that the model itself must write between the generation prompt and the answer, which
        is message `number`."""
        if between not in self._leads:
            prompt = _MARKS.split(self._render(messages[:number], generation=True))[-1]
            if not between.startswith(prompt):
                raise UserError(
                    "model.template: the chat template's generation prompt is not how its answers begin "
                    f"({prompt!r} against {between!r}), so training would not match generation. {_REMEDY}"
                )
            self._leads[between] = between[len(prompt) :]
        return self._leads[between]

    def _after_answer(self, text: str) -> list[Piece]:
        """The template's text after an answer; its first special token ends the answer and is learned."""
        token = self._special.match(text, len(text) - len(text.lstrip()))
        if not token or token[0] == IMAGE:
            return self._parse(text)
        ending = [Piece("text", text[: token.start()], supervised=True)] if token.start() else []
        ending.append(Piece("special", self._names.get(token[0], token[0]), supervised=True))
        return ending + self._parse(text[token.end() :])

    def _parse(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        place = 0
        for token in self._special.finditer(text):
            pieces += [Piece("text", text[place : token.start()])] if token.start() > place else []
            name = self._names.get(token[0], token[0])
            pieces.append(Piece("image") if name == IMAGE else Piece("special", name))
            place = token.end()
        return pieces + ([Piece("text", text[place:])] if place < len(text) else [])


def with_ends(tokenizer: PreTrainedTokenizerFast, chat_template: str) -> str:
    """The template, with the end-of-sequence token after each answer if it ends the first of two answers with no token.

    Raises:
        UserError: see `ChatTemplate`; or the tokenizer has no such token.
    """
    pieces = ChatTemplate(tokenizer, chat_template)([*_PROBE, *_PROBE], has_images=False)
    if sum(piece.kind == "special" and piece.supervised for piece in pieces) > 1 or tokenizer.eos_token is None:
        return chat_template
    return _ENDED.replace("END", repr(str(tokenizer.eos_token))).replace("\n", "") + chat_template


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring texts of one kind as one piece: tokenizers must see a running text whole."""
    joined = pieces[:1]
    for piece in pieces[1:]:
        last = joined[-1]
        if piece.kind == last.kind == "text" and piece.supervised == last.supervised:
            joined[-1] = Piece("text", last.text + piece.text, piece.supervised)
        else:
            joined.append(piece)
    return joined
