"""A trial of a base's tokenizer and chat template in a process with limits on time and memory.

A tokenizer.json holds regular expressions and replacements, and a chat template is a program: either may take for ever, or
all memory, and only running it shows that.
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
"""CPU time; the largest vocabularies take a third of a second."""
_PATIENCE = 60  # seconds by the clock
_MEMORY = 2**31  # bytes more than this process has now
_GROWTH = 64  # a ligature of Unicode becomes 18 characters
_MOST_ADDED = 2**15
_MOST_RENDERED = 2**20  # characters
_LONG, _SHORT = 2_000, 48
_CHARACTERS = "aA1 \n\t.,-_'\"/<|▁Ġéß中\u0301\u200d🙂"
_GROWS = "writes far more than it is given"
_FINE, _FULL, _FAULTY = range(3)  # exit codes of the process

_LANGUAGE = (
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "generation_config.json", "chat_template.jinja",
)  # fmt: skip


def check_texts(base: Base) -> None:
    """Check all files other than configs and weights before a library reads them by itself.

    Raises:
        UserError: one cannot be read, or would make a run fail much later, or hang.
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
    """Load a tokenizer.json, and let it encode and decode odd texts.

    Raises:
        UserError: it cannot be read as a file, takes too much time or memory, or makes texts many times as long.
    """
    check_file(file)
    if problem := _problem(lambda: _try_tokenizer(file)):
        raise UserError(
            f"{file} {problem}, tried with texts of at most {_LONG:,} characters. Its normalizer, pre_tokenizer, model, "
            "post_processor or decoder is not what it should be. Download it again from the publisher of the model"
        )


def check_template(tokenizer: PreTrainedTokenizerFast, template: str, source: Path) -> None:
    """Render conversations of several lengths with a base's own chat template.

    Raises:
        UserError: it takes too much time or memory, or writes many times as much as it is given.
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
        return "makes no tokens from a text"
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
    except SyntaxError as error:  # in the Python program that jinja2 makes from it
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
    """One character many times, alone and followed by another: this makes a careless regular expression backtrack for ever.

    Args:
        description: The tokenizer's parts as text; its characters are tried, too.
    """
    for character in _CHARACTERS:
        yield character * _LONG
    for character in dict.fromkeys(_CHARACTERS + description[:_LONG]):
        yield character * _SHORT + "!"
        yield character * _SHORT + "\n"


def _problem(action: Callable[[], str]) -> str:
    """What goes wrong when `action` runs in a process of its own; "" if nothing does, or it raises an ordinary exception.

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
    """Run `action` in the child, which lets no exception, no output and no core file out."""
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
    except Exception:  # it comes again, with its message, when the files are used
        ended = _FINE
    finally:  # reached with _FAULTY by what is not an Exception: a panic in Rust
        os._exit(ended)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
