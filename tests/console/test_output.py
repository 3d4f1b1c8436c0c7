"""What the user sees."""

import io
import os
import sys

import pytest

from llava_accel.console.command_line import run
from llava_accel.console.output import Console, LastingOutput
from llava_accel.console.verbs import read_arguments


def test_a_phase_prints_about_twenty_lines_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().bar("read data", 1000) as bar:
        for _ in range(1000):
            bar.advance(1, "a note")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "read data 1,000/1,000 a note"
    assert len(lines) == 20


def test_a_phase_without_news_prints_nothing_before_somebody_wonders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 5.5, 6.0, 11.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Console().bar("evaluate", 4) as bar:
        for _ in range(4):
            bar.advance()
    assert capsys.readouterr().out.splitlines() == ["evaluate 2/4", "evaluate 4/4"]


def test_a_short_phase_prints_every_note_and_an_empty_one_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    with console.bar("train", 3) as bar:
        for _ in range(3):
            bar.advance(1, "loss")
    with console.bar("nothing", 0):
        pass
    assert capsys.readouterr().out.splitlines() == ["train 1/3 loss", "train 2/3 loss", "train 3/3 loss"]


def test_a_resumed_phase_goes_on_from_where_it_stood(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Console().open_bar("train", 4, 2)
    bar.advance(1, "loss")
    bar.advance(1, "loss")
    bar.close()
    assert capsys.readouterr().out.splitlines() == ["train 3/4 loss", "train 4/4 loss"]


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(is_main=False)
    console.line("a line")
    console.table("a table", ["a"], [["b"]])
    with console.bar("a bar", 1) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("text", ["[red]no colour[/red]", "[/unbalanced]", "a [link=x]b[/link]", "[1, 2]"])
def test_data_is_never_read_as_markup(capsys: pytest.CaptureFixture[str], text: str) -> None:
    console = Console()
    console.line(text)
    console.table("a table", ["a"], [[text]])
    printed = capsys.readouterr().out
    assert printed.count(text) == 2


def test_data_never_drives_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.line("red \x1b[31m bell \x07")
    console.table("a table", ["a"], [["red \x1b[31m"]])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "\\x1b[31m" in printed


def test_no_letter_that_the_terminal_lacks_ends_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given, taken = (io.TextIOWrapper(io.BytesIO(content), encoding="ascii") for content in (b"gr\xf6\xdfer?\n", b""))
    monkeypatch.setattr(sys, "stdin", given)
    monkeypatch.setattr(sys, "stdout", taken)
    monkeypatch.setattr(sys, "__stdout__", taken)
    run(lambda: (print(input()), Console().line("gr\u00f6\u00dfer"), print("\u732b")))
    sys.stdout.flush()
    assert taken.buffer.getvalue().splitlines() == [rb"gr\ufffd\ufffder?", rb"gr\xf6\xdfer", rb"\u732b"]  # pyright: ignore


@pytest.mark.parametrize("is_full", [True, False])
def test_a_full_disk_or_a_reader_that_has_gone_ends_no_command(
    is_full: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    writer = os.open("/dev/full", os.O_WRONLY) if is_full else writer
    with open(writer, "w", encoding="utf-8") as given:
        stream = LastingOutput(given)
        for _ in range(3):
            print("a line\n" * 10_000, file=stream, flush=True)
        stream.detach()
    reason = "No space left on device" if is_full else "Broken pipe"
    assert capsys.readouterr().err == f"note: nothing more is printed ({reason}); the command goes on\n"


def test_a_closed_input_is_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(EOFError):
        run(lambda: sys.exit(input()))
    sys.stdin.close()


def test_bytes_that_are_no_utf_8_are_asked_as_question_marks() -> None:
    words = ["--base", "b", "--system", "caf\udce9", "--once", "caf\udce9, gr\u00f6\u00dfer?"]
    arguments = read_arguments("chat", words)
    assert (arguments.system, arguments.once) == ("caf?", "caf?, gr\u00f6\u00dfer?")
