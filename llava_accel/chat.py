"""Talk to a base or an adapter in the terminal, with images, in exactly the prompts that it was trained on.

Commands such as /image FILE and /reset come between the questions; /help shows them.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("chat")  # before the imports below, so that help and mistakes are answered at once


import argparse
import select
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llava_accel.console.output import printable
from llava_accel.exceptions import UserError
from llava_accel.inference.typed import help_text, kept_history, remember, split_command, typed_paths

if TYPE_CHECKING:
    from llava_accel.inference.dialogue import Dialogue
    from llava_accel.inference.origin import Loaded, Trained

_POLL_S = 0.2
_PROMPT = "> "


def show_line(text: str) -> None:
    """Print a line that cannot drive the terminal."""
    print(printable(text), flush=True)


def load_named(
    arguments: argparse.Namespace, say: Callable[[str], object], *, keep_base: bool = False
) -> "tuple[Trained, Loaded]":
    """Load what the command line names; UserError if it cannot be used.

    Args:
        say: Called with a line about which weights these are, and with notes about them.
        keep_base: See `load_trained`.
    """
    # Here, because libraries take seconds and weights minutes, in which a user can write the first question.
    from transformers.utils.logging import disable_progress_bar

    from llava_accel.inference.origin import describe, find_trained, load_here

    trained = find_trained(
        arguments.adapter, base=arguments.base, template=arguments.template, bits=arguments.bits or 0
    )
    disable_progress_bar()  # it would run through the prompt, or into the file of `--once`
    say(describe(trained))
    loaded = load_here(trained, keep_base=keep_base)
    for note in loaded.notes:
        say(note)
    return trained, loaded


def open_dialogue(arguments: argparse.Namespace, say: Callable[[str], object]) -> "Dialogue":
    """A dialogue with what the command line names, begun with its system prompt and images; UserError if one of them
    cannot be used."""
    from llava_accel.inference.dialogue import Dialogue, checked_image

    for image in arguments.image:
        checked_image(Path(image))  # before the weights, which may take minutes
    trained, loaded = load_named(arguments, say)
    dialogue = Dialogue(loaded, trained.recipe, arguments.max_new_tokens)
    if arguments.system is not None:
        dialogue.use_system(arguments.system)
    for image in arguments.image:
        dialogue.show(Path(image))
    return dialogue


def in_background(open_it: Callable[[], "Dialogue"]) -> "Future[Dialogue]":
    """Open a dialogue in another thread."""
    opening: Future[Dialogue] = Future()

    def work() -> None:
        try:
            opening.set_result(open_it())
        except Exception as error:  # the main thread raises it
            opening.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon: Ctrl-C does not wait for the weights
    return opening


def talk(opening: "Future[Dialogue]", notes: list[str]) -> None:
    """Read questions and commands until the end of the input; the first one waits until the dialogue is open.

    Args:
        notes: Lines to print once the dialogue is open; empty afterwards.

    Raises:
        UserError: the dialogue could not be opened.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Ask a question. /image FILE adds an image to it, /help shows all commands.")
    while True:
        try:
            line = (_read(opening, notes) if is_terminal else input()).strip()
        except EOFError:
            print(end="\n" if is_terminal else "")  # the shell's own prompt gets a line
            return
        if line == "/quit":
            return
        if not line:
            continue
        if is_terminal and not opening.done():
            print("(the model is still being loaded)", flush=True)
        dialogue = _opened(opening, notes)
        try:
            _obey(dialogue, line)
        except UserError as error:
            show_line(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(stopped; the question is forgotten)")


def _read(opening: "Future[Dialogue]", notes: list[str]) -> str:
    """The next line from a terminal. Until the dialogue is open there is no line editing: an error must be reported before
    the user has written a line in vain."""
    if not opening.done():
        print(_PROMPT, end="", flush=True)
        while not opening.done():
            if select.select([sys.stdin], [], [], _POLL_S)[0]:
                if not (line := sys.stdin.readline()):
                    raise EOFError
                remember(line)
                return line
        print("\r", end="")
    _opened(opening, notes)
    return input(_PROMPT)


def _opened(opening: "Future[Dialogue]", notes: list[str]) -> "Dialogue":
    dialogue = opening.result()
    while notes:
        show_line(notes.pop(0))
    return dialogue


def _obey(dialogue: "Dialogue", line: str) -> None:
    command, rest = split_command(line)
    if command == "/image":
        paths = typed_paths(rest)
        for path in paths:
            dialogue.show(path)
        images = "image is" if len(paths) == 1 else f"{len(paths)} images are"
        print(f"(the {images} part of the next question)")
        if dialogue.sees_whole_squares:
            print(
                "(several images are seen as one small square each, as in training; one alone, after /reset, in detail)"
            )
    elif command == "/system":
        dialogue.use_system(rest)
        since = "from the next conversation on; /reset starts it" if dialogue.has_begun else "from here on"
        print(f"({'this is the system prompt' if rest else 'there is no system prompt'} {since})")
    elif command == "/reset":
        dialogue.reset()
        print("(new conversation)")
    elif command == "/help":
        print(help_text())
    else:
        dialogue.ask(line, on_text=lambda text: print(printable(text), end="", flush=True))
        print(flush=True)


def open_page(arguments: argparse.Namespace) -> None:
    """Serve the page of `--web` until Ctrl-C; UserError if it cannot be opened."""
    if find_spec("gradio") is None:
        raise UserError('--web needs gradio, which is not installed. Run: pip install "llava_accel[web]"')
    from llava_accel.console.door import open_door
    from llava_accel.inference.beside import why_no_base
    from llava_accel.inference.collected import Collection
    from llava_accel.inference.dialogue import Dialogue
    from llava_accel.inference.web import Columns, show

    door = open_door(arguments.port)
    collection = Collection(arguments.collect, arguments.system) if arguments.collect else None

    trained, loaded = load_named(arguments, show_line, keep_base=True)
    dialogue = Dialogue(loaded, trained.recipe, arguments.max_new_tokens)
    if arguments.system is not None:
        dialogue.use_system(arguments.system)
    why = why_no_base(trained, loaded)
    if why and arguments.adapter:
        show_line(f"The page has no answers of the base: {why}.")
    show(Columns(dialogue, loaded, has_base=not why), collection, door)


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel chat`."""
    if arguments.web:
        return open_page(arguments)
    if arguments.once is None and sys.stdin.isatty():
        notes: list[str] = []
        with kept_history():
            talk(in_background(lambda: open_dialogue(arguments, notes.append)), notes)
        return
    # What libraries print must not be among the answers.
    with redirect_stdout(sys.stderr):
        dialogue = open_dialogue(arguments, print)
        answer = None if arguments.once is None else dialogue.ask(arguments.once)
    if answer is None:
        opened: Future[Dialogue] = Future()
        opened.set_result(dialogue)
        talk(opened, [])
    else:
        show_line(answer)
