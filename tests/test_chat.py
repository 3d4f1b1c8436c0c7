"""Chat asks in the words of the training, answers as it goes, and lets nothing drive the terminal."""

import io
import json
import os
import shutil
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
from helpers.tiled import copy_original
from llava_accel import chat
from llava_accel.console.command_line import start
from llava_accel.exceptions import UserError
from llava_accel.inference.dialogue import Dialogue
from llava_accel.inference.origin import Loaded, Trained, describe, find_trained, load_trained

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
    chat.talk(opened, [])


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
        ("/imagine", "/imagine is not a command. Did you mean /image? /help shows all of them"),
        ("/xyzzy", "/xyzzy is not a command. /help shows all of them"),
        ("/image", "/image names no file. Write /image FILE"),
        ("/image 'no end.png", "no closing quotation. Close the quotes, or leave them out"),
        ("/image two words.png", "there is no image 'two words.png'"),
        ("/system <image> first", "<image> in a system prompt has no image. Leave it out"),
        ("/system " + "why " * 3000, "the system prompt cannot be used: it is longer than the"),
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


def test_images_are_found_as_terminals_and_file_managers_write_their_names(
    dialogue: Dialogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "my pic.png"
    mine.write_bytes(ONE.read_bytes())
    monkeypatch.chdir(tmp_path)
    uri = mine.as_uri()
    spellings = ('"my pic.png"', "'my pic.png'", "my pic.png", r"my\ pic.png", uri, f"'{mine}'", "./my pic.png")
    assert "%20" in uri
    for text in spellings:
        type_in(monkeypatch, dialogue, f"/image {text}")
        assert dialogue._waiting == [str(mine)], text
        dialogue.reset()
    type_in(monkeypatch, dialogue, f"/image '{mine}' {TWO}")
    assert dialogue._waiting == [str(mine), str(TWO)]
    said = capsys.readouterr().out
    assert "error" not in said and said.endswith("(the 2 images are part of the next question)\n")


def test_a_system_prompt_holds_from_the_next_conversation_on(
    dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begins() -> tuple[str, str]:
        return (dialogue._turns[0].role, dialogue._turns[0].text)

    type_in(monkeypatch, dialogue, "/system You are a painter.", "Hello")
    assert begins() == ("system", "You are a painter.") and len(dialogue._turns) == 3
    assert "(this is the system prompt from here on)" in capsys.readouterr().out
    type_in(monkeypatch, dialogue, "/system", "Hello again")
    assert begins() == ("system", "You are a painter.") and len(dialogue._turns) == 5
    assert "(there is no system prompt from the next conversation on; /reset starts it)" in capsys.readouterr().out
    type_in(monkeypatch, dialogue, "/reset", "Hello")
    assert begins() == ("system", "")


def test_help_names_every_command(
    dialogue: Dialogue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, dialogue, "/help")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["/image", "/system", "/reset", "/help", "/quit"]
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize(
    ("place", "which"),
    [("best", r"the best by loss"), ("checkpoints", r"its last checkpoint"), ("export", "")],
)
def test_the_weights_are_named_with_run_step_and_whether_they_are_the_best(
    place: str, which: str, lora_run: Path
) -> None:
    folder = next((lora_run / place).iterdir()) if place == "checkpoints" else lora_run / place
    said = describe(find_trained(str(folder)))
    assert said.startswith(f"weights: {folder}, step ") and "(run run" in said and which in said
    assert describe(find_trained(str(lora_run))) == describe(find_trained(str(lora_run / "best")))


def test_an_older_best_says_which_step_is_the_last(lora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    facts = run / "best" / "llava_accel.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"step": 1}))
    said = describe(find_trained(str(run)))
    assert said.endswith(", step 1 (run run, the best by loss, the last is step 2)")
    assert describe(find_trained(base=str(ORIGINAL))) == f"weights: {ORIGINAL}"


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
    chat.talk(opening, [])
    assert capsys.readouterr().out.splitlines()[1:] == ["> (the model is still being loaded)", "It is red.", "> "]


def test_what_cannot_be_loaded_is_said_at_the_prompt(terminal: int) -> None:
    def open_it() -> Dialogue:
        raise UserError("no such base")

    with pytest.raises(UserError, match="no such base"):
        chat.talk(chat.in_background(open_it), [])


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


def test_an_image_is_looked_for_before_the_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chat", "--base", "./nowhere", "--image", "nowhere.png", "--once", "Hello"])
    with pytest.raises(SystemExit, match="2"):
        start("chat")
    assert "there is no image 'nowhere.png'. Correct the path" in capsys.readouterr().err


def test_a_template_has_any_of_its_names_and_is_checked_before_the_weights(lora_run: Path) -> None:
    assert find_trained(str(lora_run), template="chatml_direct").recipe.model.template == "chatml"
    with pytest.raises(UserError, match=r'model\.template = "v9"'):
        find_trained(base="./nowhere", template="v9")


def test_four_bits_are_loaded_where_they_are_asked_for(lora_run: Path, loaded: Loaded) -> None:
    trained = find_trained(str(lora_run), bits=4)
    quantised = load_trained(trained, dtype=torch.float32, device=CPU)
    layer = quantised.objective.llava.model.language_model.layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert Dialogue(quantised, trained.recipe, 2).ask("Hello") is not None


def test_a_base_that_cuts_images_says_when_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = find_trained(base=str(copy_original("llava_next", tmp_path)))
    dialogue = Dialogue(load_trained(trained, dtype=torch.float32, device=CPU), trained.recipe, 1)
    type_in(monkeypatch, dialogue, f"/image {ONE}")
    assert "small square" not in capsys.readouterr().out
    type_in(monkeypatch, dialogue, f"/image {TWO}")
    assert "seen as one small square each" in capsys.readouterr().out
    type_in(monkeypatch, dialogue, "/reset", f"/image {TWO}")
    assert "small square" not in capsys.readouterr().out
