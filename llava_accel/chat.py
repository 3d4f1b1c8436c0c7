"""Talk to a base or an adapter in the terminal, with images, in exactly the prompts that it was trained on.

Commands: /image FILE adds an image to the next question, /reset starts a new conversation, /quit ends.
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
from pathlib import Path
from typing import TYPE_CHECKING

from llava_accel.console.output import printable
from llava_accel.exceptions import UserError

if TYPE_CHECKING:
    from llava_accel.inference.dialogue import Dialogue

_POLL_S = 0.2


def open_dialogue(arguments: argparse.Namespace) -> "Dialogue":
    """Load what the command line names, with its image if there is one; UserError if one of them cannot be used."""
    # Here, because libraries take seconds and weights minutes, in which a user can write the first question.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from llava_accel.inference.dialogue import Dialogue
    from llava_accel.inference.origin import find_trained, load_trained
    from llava_accel.model.save import with_step
    from llava_accel.runtime.engines import resolve_precision

    trained = find_trained(
        arguments.adapter, base=arguments.base, template=arguments.template, bits=arguments.bits or 0
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    disable_progress_bar()  # it would run through the prompt, or into the file of `--once`
    print(f"loading {with_step(trained.folder)}", file=sys.stderr)
    loaded = load_trained(trained, dtype=resolve_precision(trained.recipe.run.precision, device), device=device)
    for note in loaded.notes:
        print(note, file=sys.stderr)
    dialogue = Dialogue(loaded, trained.recipe, arguments.max_new_tokens)
    for image in arguments.image:
        dialogue.show(Path(image))
    return dialogue


def in_background(open_it: Callable[[], "Dialogue"]) -> "Future[Dialogue]":
    """Open a dialogue beside the main thread."""
    opening: Future[Dialogue] = Future()

    def work() -> None:
        try:
            opening.set_result(open_it())
        except Exception as error:  # the main thread raises it
            opening.set_exception(error)

    threading.Thread(target=work, daemon=True).start()  # a daemon: Ctrl-C does not wait for the weights
    return opening


def talk(opening: "Future[Dialogue]") -> None:
    """Read questions and commands until the end of the input; the first one waits until the dialogue is open.

    Raises:
        UserError: the dialogue could not be opened.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Ask a question. /image FILE adds an image to it, /reset starts a new conversation, /quit ends.")
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
            while not opening.done() and not select.select([sys.stdin], [], [], _POLL_S)[0]:
                pass
            if opening.done():
                opening.result()  # what has gone wrong is said before the user has written a line in vain
        try:
            line = input().strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if not line:
            continue
        if is_terminal and not opening.done():
            print("(the model is still being loaded)", flush=True)
        dialogue = opening.result()
        try:
            _obey(dialogue, line)
        except UserError as error:
            print(printable(f"error: {error}"))
        except KeyboardInterrupt:
            print("\n(stopped; the question is forgotten)")


def _obey(dialogue: "Dialogue", line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/image":
        dialogue.show(Path(rest.strip()))
        print("(the image is part of the next question)")
    elif command == "/reset":
        dialogue.reset()
        print("(new conversation)")
    elif command.startswith("/"):
        print(printable(f"error: {command} is not a command. Use /image FILE, /reset or /quit"))
    else:
        dialogue.ask(line, on_text=lambda text: print(printable(text), end="", flush=True))
        print(flush=True)


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel chat`."""
    if arguments.once is None and sys.stdin.isatty():
        talk(in_background(lambda: open_dialogue(arguments)))
        return
    # What libraries print must not stand among the answers.
    with redirect_stdout(sys.stderr):
        dialogue = open_dialogue(arguments)
        answer = None if arguments.once is None else dialogue.ask(arguments.once)
    if answer is None:
        opened: Future[Dialogue] = Future()
        opened.set_result(dialogue)
        talk(opened)
    else:
        print(printable(answer))
