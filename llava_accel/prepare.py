"""`llava-accel prepare`: public data sets and tables -> the JSON lines that data.train reads."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_accel.console.command_line import run
from llava_accel.console.mistaken import refuse_paths_with_a_dash
from llava_accel.converters.sources import SOURCES, Source
from llava_accel.exceptions import UserError

_COMMAND = "llava-accel prepare"
_HELD_OUT = ("val", "minival", "testdev", "test-dev", "test")
"""Splits to evaluate on; the first of these that was written is proposed, as a test split is for the end."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; an error that the user can mend ends it with a message and exit code 2."""
    parser, words = _parser(), sys.argv[1:] if argv is None else argv
    refuse_paths_with_a_dash(parser, words)
    arguments = parser.parse_args(words)
    run(lambda: _write(arguments))


def _write(given: argparse.Namespace) -> None:
    # torch comes with the converters, and `--help` should not wait for it.
    from llava_accel.converters.faults import write_part

    num_names = len(given.split_name)
    if num_names and num_names != (num_files := len(given.file or given.questions)):
        raise UserError(
            f"--split-name gives {num_names} name(s) for {num_files} file(s). Give one per file or pair of files."
        )
    written: list[Path] = []
    for part in given.parts(given):
        write_part(part, given.on_bad_record == "skip", print)
        written.append(part.out)
    metric = "multiple_choice" if given.multiple_choice else given.metric
    if metric:
        print(f'eval.metric = "{metric}" suits these records')
    _print_next(written, given.images)


def _print_next(written: Sequence[Path], images: Path) -> None:
    """Print the command that makes a recipe for the new files: trained on "train", else the first, evaluated on another."""
    by_split = {path.stem: path for path in written}
    train = by_split.get("train", written[0])
    others = [path for path in written if path != train]
    best = (by_split[split] for split in _HELD_OUT if by_split.get(split) in others)
    evaluation = ["--eval", str(next(best, others[0]))] if others else []
    command = ["llava-accel", "init", "my.toml", "--data", str(train), *evaluation, "--images", str(images)]
    print(f"next: {shlex.join(command)}")


def _delimiter(text: str) -> str:
    character = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(character) != 1 or character in '"\r\n':
        raise argparse.ArgumentTypeError(f"{text!r} is not one character between cells; use , or ; or tab")
    return character


def _files(what: str) -> dict[str, Any]:
    return {"nargs": "+", "action": "extend", "default": None, "type": Path, "metavar": "FILE", "help": what}


def _names(what: str, *default: str, metavar: str = "NAME") -> dict[str, Any]:
    shown = f" (default: {' '.join(default)})" if default else ""
    return {"nargs": "+", "default": [*default], "metavar": metavar, "help": f"{what}{shown}"}


_SPLIT_NAMES = "names of the splits, one per file or pair of files (default: taken from the files)"
_FLAGS: dict[str, dict[str, Any]] = {
    "file": _files("the data set's own files, unpacked"),
    "table": {"type": Path, "metavar": "F.csv", "help": "the table, with a header"},
    "questions": _files("questions files"),
    "annotations": _files("their annotations, in the same order"),
    "problems": {"type": Path, "metavar": "F.json", "help": "problems.json"},
    "pid-splits": {"type": Path, "metavar": "F.json", "help": "pid_splits.json"},
    "splits": _names("which of its splits to write", "train", "val", "test"),
    "set": {"metavar": "NAME", "help": "org/name, or a file or folder"},
    "config": {"default": "", "metavar": "NAME", "help": "configuration of the data set (default: its default one)"},
    "split": _names("which splits to write", "train"),
    "columns": _names("names of its columns, such as question=prompt answer=label", metavar="OURS=THEIRS"),
    "images": {"type": Path, "metavar": "DIR", "help": "folder of the images; a data set's may lie one folder below"},
    "split-name": _names(_SPLIT_NAMES) | {"action": "extend"},
    "multiple-choice": {"action": "store_true", "help": "list the options, and train on the letter of the right one"},
    "explain": {"action": "store_true", "help": "train on lecture, solution and answer"},
    "one-per-image": {"action": "store_true", "help": "one record per image instead of one per caption"},
    "image-column": _names("columns of image names, each for one <image>", "image"),
    "question-column": {"default": "", "metavar": "NAME", "help": "column of the question (default: question)"},
    "question": {"default": "", "metavar": "TEXT", "help": "the question of all records"},
    "answer-column": _names("columns of answers, each of one annotator", "answer"),
    "encoding": {"default": "", "metavar": "NAME", "help": "of the file, such as cp1252 (default: detected)"},
    "delimiter": {"type": _delimiter, "metavar": "C", "help": "such as ; or tab (default: detected)"},
    "suffix": {"metavar": "TEXT", "help": "line below each question, '' for none (default: %(default)r)"},
}


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter  # keeps the lines of the examples
    about = "Turn public data sets and tables into the JSON lines that data.train reads."
    epilog = _example("okvqa", SOURCES["okvqa"])
    parser = argparse.ArgumentParser(_COMMAND, description=about, epilog=epilog, formatter_class=layout)
    # Flags that a source does not take have a value all the same, so that the code that reads them need not ask.
    parser.set_defaults(file=[], questions=[], split_name=[], multiple_choice=False)
    group = parser.add_subparsers(title="sources", required=True, metavar="SOURCE", dest="source")
    for name, source in SOURCES.items():
        summary = source.about.partition("\n")[0].replace("%", "%%")
        added = group.add_parser(
            name, help=summary, description=source.about, epilog=_example(name, source), formatter_class=layout
        )
        _add_flags(added, name, source)
    return parser


def _add_flags(parser: argparse.ArgumentParser, name: str, source: Source) -> None:
    flags = source.flags.split()
    for flag in flags:
        settings, plain = _FLAGS[flag.rstrip("!")], flag.rstrip("!").replace("table", "file")
        needed: dict[str, Any] = {"required": True} if flag.endswith("!") else {}
        default = {"default": source.suffix} if plain == "suffix" else {}
        parser.add_argument(f"--{plain}", **{**settings, **needed, **default})
    bad = "what to do with records that cannot be used: stop and list all of them, or leave them out (default: error)"
    parser.add_argument("--on-bad-record", choices=("error", "skip"), default="error", help=bad)
    out = "F.jsonl" if name == "csv" else "DIR"
    parser.add_argument("--out", required=True, type=Path, metavar=out, help="where the JSON lines go")
    parser.set_defaults(parts=source.parts, metric=source.metric)


def _example(name: str, source: Source) -> str:
    lines = " \\\n    ".join([f"{_COMMAND} {name}", *source.example])
    return f"example, {source.given}:\n  {lines}\n"


if __name__ == "__main__":
    main()
