"""What a base's files make of text, tried once in a process with limits of time and memory.

A tokenizer.json holds regular expressions and replacements, and a chat template is a program: each may take for ever, or
all memory, and nothing that could be read off them tells.
"""

import faulthandler
import os
import resource
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_accel.data.conversation import IMAGE, TEMPLATES, Turn
from llava_accel.data.jinja_template import REFUSALS, ChatTemplate
from llava_accel.exceptions import UserError
from llava_accel.model.bases import Base, generation_settings
from llava_accel.model.files import check_file, check_files, read_json
from llava_accel.model.limits import IMAGE_FILES, check_ids, check_length

_SECONDS = 3
"""Of the processor; the largest vocabularies take a third of one."""
_PATIENCE = 60
_MEMORY = 2**31  # bytes more than this process has now
_GROWTH = 64  # a ligature of Unicode becomes 18 characters
_MOST_ADDED = 2**15
_MOST_RENDERED = 2**20  # characters
_LONG, _SHORT = 2_000, 48
_SIGNS = "aA1 \n\t.,-_'\"/<|▁Ġéß中\u0301\u200d🙂"
_GROWS = "writes far more than it is given"
_FINE, _FULL, _FAULTY = range(3)


_LANGUAGE = (
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "generation_config.json", "chat_template.jinja",
)  # fmt: skip


def check_texts(base: Base) -> None:
    """Look at all files, other than configs and weights, before a library reads them by itself.

    Raises:
        UserError: one cannot be read, or holds what would end a run much later, or never.
    """
    check_files(base.folder, _LANGUAGE)
    check_files(base.tower or base.folder, IMAGE_FILES)
    check_ids(generation_settings(base), base.text.vocab_size, base.folder / "generation_config.json")
    settings = base.folder / "tokenizer_config.json"
    if settings.exists():
        check_length(read_json(settings), settings)
    if os.path.lexists(base.folder / "tokenizer.json"):
        check_tokenizer(base.folder / "tokenizer.json")


def check_tokenizer(file: Path) -> None:
    """Load a tokenizer.json, and let it take odd texts apart and put them together.

    Raises:
        UserError: it cannot be read as a file, takes too long or too much, or makes texts many times as long.
    """
    check_file(file)
    if problem := _problem(lambda: _try_tokenizer(file)):
        raise UserError(
            f"{file} {problem}, tried with texts of at most {_LONG:,} characters. Its normalizer, pre_tokenizer, model, "
            "post_processor or decoder is not what it should be. Download it again from who published the model"
        )


def check_template(tokenizer: PreTrainedTokenizerFast, template: str, source: Path) -> None:
    """Render conversations of several lengths with a base's own chat template.

    Raises:
        UserError: it takes too long or too much, or writes many times as much as it is given.
    """
    if problem := _problem(lambda: _try_template(tokenizer, template)):
        raise UserError(
            f"model.template: the chat template of {source} {problem} for a short conversation. Name one of LLaVA's "
            f"templates instead of 'auto': {', '.join(TEMPLATES)}"
        )


def _try_tokenizer(file: Path) -> str:
    tokenizer = Tokenizer.from_file(str(file))
    if len(tokenizer.get_added_tokens_decoder()) > _MOST_ADDED:
        return f"has more than {_MOST_ADDED:,} added_tokens, which take minutes to read"
    tokenizer.no_padding()  # some files hold the settings of their last use
    tokenizer.no_truncation()
    if not tokenizer.encode("a text", add_special_tokens=False).ids:
        return "makes no token of a text"
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    for text in _texts(" ".join(map(str, parts))):
        made = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        encoded = tokenizer.encode(text)
        joined = tokenizer.decoder.decode([text, "a", text]) if tokenizer.decoder else ""
        if max(len(made), len(encoded.ids), len(joined) // 3) > _GROWTH * (len(text) + 1):
            return _GROWS
    return ""


def _try_template(tokenizer: PreTrainedTokenizerFast, template: str) -> str:
    try:
        with suppress(*REFUSALS):
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "q"}], chat_template=template, add_generation_prompt=True, tokenize=False
            )
        render = ChatTemplate(tokenizer, template)
    except SyntaxError as error:  # of the program that jinja2 makes of it
        return f"cannot be read ({error.msg})"
    for rounds in (1, 2, 3, 9):
        turns = [Turn("user", "q" * 99), Turn("assistant", "a" * 99)] * rounds
        with_image = [Turn("user", f"{IMAGE}\nq"), *turns[1:]]
        for each, has_images in ((turns, False), (with_image, True), ([Turn("system", "s"), *turns], False)):
            with suppress(UserError):  # not every template takes each of them
                if sum(len(piece.text) for piece in render(each, has_images)) > _MOST_RENDERED:
                    return _GROWS
    return ""


def _texts(description: str) -> Iterator[str]:
    """A sign many times, then one that it cannot go on with: what makes a careless expression go through all ways.

    Args:
        description: Of the tokenizer; its signs are tried, too.
    """
    for sign in _SIGNS:
        yield sign * _LONG
    for sign in dict.fromkeys(_SIGNS + description[:_LONG]):
        yield sign * _SHORT + "!"
        yield sign * _SHORT + "\n"


def _problem(action: Callable[[], str]) -> str:
    """What goes wrong when `action` runs in a process of its own, "" if nothing; what it raises is for later to say.

    Args:
        action: Returns what is wrong with its output.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _run(action, writer)
    os.close(writer)
    try:
        is_over = select.select([reader], [], [], _PATIENCE)[0]  # also when the child's end of the pipe is closed
        said = os.read(reader, 200).decode() if is_over else ""
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    ended = os.waitstatus_to_exitcode(status)
    if said:
        return said
    if ended == -signal.SIGXCPU or not is_over:
        return f"takes more than {_SECONDS} s"
    if ended in (_FULL, -signal.SIGABRT):
        return f"takes more than {_MEMORY // 2**30} GiB of memory"
    return "" if ended == _FINE else "crashes"


def _run(action: Callable[[], str], writer: int) -> NoReturn:
    """In the child: no exception, no output and no core file of it gets out."""
    ended = _FAULTY
    try:
        faulthandler.disable()
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)  # a run listens to it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, _SECONDS)
        memory = Path("/proc/self/statm")
        if memory.exists():
            _limit(resource.RLIMIT_AS, int(memory.read_text().split()[0]) * resource.getpagesize() + _MEMORY)
        os.write(writer, action().encode())
        ended = _FINE
    except MemoryError:
        ended = _FULL
    except Exception:  # is met again, with its message, where the files are put to use
        ended = _FINE
    finally:  # what is no Exception is a panic of Rust's
        os._exit(ended)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
