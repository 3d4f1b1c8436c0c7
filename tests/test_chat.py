"""Chat asks in the words of the training, answers as it goes, and lets nothing drive the terminal."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from helpers.exported import CPU, ORIGINAL, ROOT
from helpers.runs import PARITY
from llava_accel import chat
from llava_accel.console.command_line import start
from llava_accel.exceptions import UserError
from llava_accel.inference.dialogue import Dialogue
from llava_accel.inference.origin import Loaded, Trained, find_trained, load_trained

pytestmark = pytest.mark.slow

ONE, TWO = PARITY / "images" / "t0.png", PARITY / "images" / "t3.png"


@pytest.fixture(scope="module")
def trained(lora_run: Path) -> Trained:
    return find_trained(str(lora_run))


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> Loaded:
    return load_trained(trained, dtype=torch.float32, device=CPU)


@pytest.fixture
def dialogue(loaded: Loaded, trained: Trained) -> Dialogue:
    return Dialogue(loaded, trained.recipe, 8)


def type_in(monkeypatch: pytest.MonkeyPatch, dialogue: Dialogue, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    opened: Future[Dialogue] = Future()
    opened.set_result(dialogue)
    chat.talk(opened)


def test_once_prints_the_answer_and_nothing_else(lora_run: Path, dialogue: Dialogue) -> None:
    dialogue.show(TWO)
    expected = dialogue.ask("What is it?")
    command = [sys.executable, "-m", "llava_accel.chat", "--adapter", str(lora_run), "--image", str(TWO)]
    command += ["--once", "What is it?", "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == chat.printable(expected) + "\n" != "\n"


def test_several_turns_images_and_commands(
    dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, dialogue, "Hello", f"/image {ONE}", "", "What is it?", "/quit", "never asked")
    assert [turn.text for turn in dialogue._turns][::2] == ["Hello", "<image>\nWhat is it?"]
    type_in(monkeypatch, dialogue, "/reset", "Hello")
    assert len(dialogue._turns) == 2 and not dialogue._images
    assert "image is part of the next question" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/image nowhere.png", "there is no image 'nowhere.png'"),
        (f"/image {PARITY / 'labels_golden.json'}", "not a readable image"),
        ("/imagine", "/imagine is not a command"),
        ("Is <image> it?", "/image FILE"),
        ("why " * 600, "/reset"),
    ],
)
def test_a_mistake_is_said_and_the_conversation_goes_on(
    line: str,
    said: str,
    dialogue: Dialogue,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in(monkeypatch, dialogue, line, "Hello")
    assert said in capsys.readouterr().out
    assert [turn.text for turn in dialogue._turns][::2] == ["Hello"]


class _Scripted(Dialogue):
    """Says what a test wants."""

    def __init__(self, pieces: Iterator[str | BaseException]) -> None:
        self.pieces = pieces

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        assert on_text
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            on_text(piece)
        return ""


def test_answers_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(monkeypatch, _Scripted(iter(["\x1b]0;title\x07", "\x1b[2J", "\u202etext", "two\nlines"])), "Hello")
    said = capsys.readouterr().out
    assert said == "\\x1b]0;title\\x07\\x1b[2J\\u202etexttwo\nlines\n"


def test_an_answer_can_be_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(monkeypatch, _Scripted(iter(["The ", KeyboardInterrupt()])), "Hello", "/quit")
    assert "stopped" in capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Lets standard input be a terminal, and gives the end that a user types into."""
    master, slave = os.openpty()
    with os.fdopen(slave) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield master
    os.close(master)


def test_a_terminal_prompts_while_the_model_is_loaded(terminal: int, capsys: pytest.CaptureFixture[str]) -> None:
    written = threading.Event()

    def open_it() -> Dialogue:
        assert written.wait(60)
        return _Scripted(iter(["It is red."]))

    opening = chat.in_background(open_it)
    os.write(terminal, b"Hello\n/quit\n")
    threading.Timer(0.5, written.set).start()
    chat.talk(opening)
    assert capsys.readouterr().out.splitlines()[1:] == ["> (the model is still being loaded)", "It is red.", "> "]


def test_what_cannot_be_loaded_is_said_at_the_prompt(terminal: int) -> None:
    def open_it() -> Dialogue:
        raise UserError("no such base")

    with pytest.raises(UserError, match="no such base"):
        chat.talk(chat.in_background(open_it))


def test_an_adapter_from_elsewhere_needs_its_base(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", "--adapter", str(PARITY / "adapter_final"), "--max-new-tokens", "2", "--once", "Hello"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        start("chat")
    assert "--base" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*arguments, "--base", str(ORIGINAL)])
    start("chat")


def test_four_bits_are_loaded_where_they_are_asked_for(lora_run: Path, loaded: Loaded) -> None:
    trained = find_trained(str(lora_run), bits=4)
    quantised = load_trained(trained, dtype=torch.float32, device=CPU)
    layer = quantised.objective.llava.model.language_model.layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert Dialogue(quantised, trained.recipe, 2).ask("Hello") is not None
