"""The arguments of each verb. No library is imported here, so that help and usage errors are quick."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from llava_accel.console.mistaken import parse, refuse_paths_with_a_dash

Reader = Callable[[argparse.ArgumentParser, Sequence[str]], argparse.Namespace]


class Verb(NamedTuple):
    """A verb: a line about it, examples, and the function that declares, reads and checks its arguments."""

    summary: str
    examples: str
    read: Reader


def read_arguments(verb: str, words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a verb, and in `module` the name of the module that does the work.

    Raises:
        SystemExit: 0 after `--help`, 2 after a usage error; the help or the message has been printed.
    """
    known = VERBS[verb]
    parser = argparse.ArgumentParser(
        prog=f"llava-accel {verb}",
        description=known.summary,
        epilog=f"example{'s' if chr(10) in known.examples else ''}:\n{known.examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(module=f"llava_accel.{verb}")
    refuse_paths_with_a_dash(parser, words)
    return known.read(parser, words)


def _train(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    _add_recipe(parser)
    add("--profile", metavar="FILE.yaml", help="start the processes of this profile of Accelerate's")
    started = "processes to start; without --profile each has a whole model (DDP)"
    add("--num-processes", type=_at_least_one, metavar="N", help=started)
    arguments = parse(parser, words)
    if arguments.profile and not Path(arguments.profile).is_file():
        parser.error(f"--profile {arguments.profile}: there is no such file. Name one, such as launch/ddp.yaml")
    if arguments.profile or (arguments.num_processes or 1) > 1:
        if "RANK" in os.environ:
            parser.error("a launcher has started this process: give it the profile and the number of processes")
        arguments.module = "llava_accel.runtime.launcher"
    return arguments


def _init(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    add("out", metavar="NEW.toml", nargs="?", help="the recipe to write")
    add("--data", nargs="+", required=True, metavar="PATH", help="what data.train takes: files, folders, org/name")
    add("--eval", default="", metavar="PATH", help="held-out data; without it a share of the images is held out")
    add("--images", default="", metavar="DIR", help="folder that image names are relative to; by default it is found")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="your columns, such as question=q answer=label")
    add("--base", default="", metavar="DIR_OR_NAME", help="the base; by default llava-hf/llava-1.5-7b-hf")
    add("--gpu", type=_gigabytes, metavar="GB", help="memory of the GPU in GB; by default that of this machine")
    tasks = ("vqa", "caption", "classify", "chat", "preference")
    add("--task", choices=tasks, help="by default guessed from the answers")
    add("--force", action="store_true", help="write over a file that is there")
    arguments = parser.parse_args(words)
    if arguments.out is None and len(arguments.data) > 1 and arguments.data[-1].endswith(".toml"):
        arguments.out = arguments.data.pop()
    if arguments.out is None:
        parser.error("name the recipe to write, such as mine.toml")
    return arguments


def _evaluate(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    _add_recipe(parser, nargs="?", reads_data=False)
    add("--adapter", metavar="DIR", help="a run, a checkpoint or an export; without it the base alone")
    add("--out", metavar="FILE.jsonl", help="write the predictions, one a line")
    add("--score", metavar="FILE.jsonl", help="score this file's predictions; takes no recipe")
    measured = "what --score measures, as in eval.metrics (default vqa_accuracy exact_match)"
    add("--metrics", metavar="NAME", nargs="+", help=measured)
    arguments = parse(parser, words)
    if arguments.score and not arguments.out:
        parser.error("--score needs --out FILE.jsonl for the scored lines")
    if arguments.metrics and not arguments.score:
        parser.error("--metrics belongs to --score; in a recipe, set eval.metrics")
    if not arguments.score and arguments.recipe is None:
        parser.error("name a recipe, or a file of predictions with --score")
    return arguments


def _check(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    _add_recipe(parser, reads_data=False)
    parser.set_defaults(wrong=None)  # a place for the problems of the recipe
    add("--labels", metavar="FILE.jsonl", help="write ids and labels of every record")
    add("--fix", metavar="DIR", help="write a clean copy and the list of what it leaves out")
    add("--show", metavar="N", type=_count, default=3, help="examples to show (default 3)")
    add("--html", metavar="FILE.html", type=Path, help="write a page: counts, errors, images with what is learned")
    add("--against", metavar="RUN", type=Path, help="list the records that this run has shown to be worth a look")
    add("--mend", metavar="FILE.jsonl", type=Path, help="with --against: write that list here, not on the console")
    add("--probe", action="store_true", help="take two steps, and say how many hours the run takes on this machine")
    arguments = parse(parser, words)
    if arguments.html and not arguments.html.absolute().parent.is_dir():
        parser.error(f"--html {arguments.html}: there is no folder {arguments.html.parent}. Make it first")
    if arguments.mend and not arguments.against:
        parser.error("--mend belongs to --against RUN")
    return arguments


def _plan(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    _add_recipe(parser, reads_data=False)
    add("--gpu", type=_gigabytes, metavar="GB", help="memory of one GPU in GB: say whether the run fits")
    several = "number of GPUs for the profiles that use several (default 8)"
    add("--gpus", type=_at_least_one, default=8, metavar="N", help=several)
    add("--probe", action="store_true", help="run the largest batch once, and compare what it takes with the plan")
    cards = "the largest batch on cards of 16, 24, 48 and 80 GB, on rows of the largest image; reads no data"
    add("--cards", action="store_true", help=cards)
    return parse(parser, words)


def _bench(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    _add_recipe(parser)
    add("--steps", type=_at_least_one, default=10, metavar="N", help="optimizer steps of a pass (default 10)")
    add("--rounds", type=_at_least_one, default=5, metavar="N", help="timed passes over these steps (default 5)")
    return parse(parser, words)


def _cache(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    _add_recipe(parser, nargs="?")
    parser.set_defaults(loaded=None)
    add("--list", action="store_true", help="show what is in the cache: the recipe's, or by default the user's")
    add("--clear", action="store_true", help="empty it; runs that are training now continue without it")
    arguments = parse(parser, words)
    if arguments.recipe is None and not (arguments.list or arguments.clear):
        parser.error("name a recipe, or take --list or --clear")
    return arguments


def _chat(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="an image for the first question")
    add("--once", type=_in_unicode, metavar="QUESTION", help="print the answer to this question, nothing else, and end")
    add("--web", action="store_true", help="serve a page: answers after and before training, and without the image")
    add("--collect", metavar="FILE.jsonl", type=Path, help="with --web: save the answers that you choose or correct")
    arguments = _read_model(parser, words, port=7860)
    if arguments.web and (arguments.image or arguments.once is not None):
        parser.error("--web takes neither --image nor --once: the page asks for them")
    if arguments.collect and not arguments.web:
        parser.error("--collect belongs to --web")
    return arguments


def _serve(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("--key", help="what requests must send; by default a new one: other users can read a command")
    parser.set_defaults(image=[])
    return _read_model(parser, words, port=8000)


def _read_model(parser: argparse.ArgumentParser, words: Sequence[str], *, port: int) -> argparse.Namespace:
    """The arguments of a verb, with those that name a model to answer and a port."""
    add = parser.add_argument
    add("--base", default="", metavar="DIR_OR_NAME", help="the base; optional where the adapter names it")
    add("--adapter", default="", metavar="DIR", help="a run, a checkpoint, an export or another adapter")
    add("--system", type=_in_unicode, metavar="TEXT", help="system prompt in place of the template's own; '' = none")
    add("--bits", type=int, choices=(4, 8, 16), help="bits of the base; by default those of the training")
    add("--max-new-tokens", type=_at_least_one, default=512, metavar="N", help="longest answer (default 512)")
    add("--template", default="", help="conversation template, for what was not trained here")
    arguments = _read_port(parser, words, port)
    if not arguments.base and not arguments.adapter:
        parser.error("name a model with --base, or what was trained with --adapter")
    return arguments


def _export(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help="a run, a checkpoint, an export, or a base to convert")
    forms = ("peft", "merged", "llava")
    add("--to", required=True, choices=forms, help="peft, transformers (merged), or LLaVA's own code")
    add("--out", required=True, metavar="DIR", help="a new folder")
    add("--base", default="", metavar="DIR_OR_NAME", help="the base, if it is not where the recipe says")
    add("--template", default="", help="conversation template, for what was not trained here")
    types = ("auto", "fp32", "bf16", "fp16")
    add("--dtype", default="auto", choices=types, help="weights of a whole model; auto = the base's")
    compared = "compare what the result and the trained model compute; the default on a GPU and for merged"
    add("--compare", action=argparse.BooleanOptionalAction, help=compared)
    add("--push", default="", metavar="ORG/NAME", help="send it to the Hugging Face hub as well")
    add("--dry-run", action="store_true", help="with --push: list what would be sent, use no network")
    arguments = parser.parse_args(words)
    if arguments.dry_run and not arguments.push:
        parser.error("--dry-run belongs to --push ORG/NAME")
    return arguments


def _report(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="a run folder; several are compared")
    add("--out", metavar="FILE.html", type=Path, help="the comparison (default comparison.html, beside the first run)")
    arguments = parser.parse_args(words)
    if arguments.out and len(arguments.runs) == 1:
        parser.error("--out is for a comparison: the report of one run is RUN/report.html")
    return arguments


def _watch(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder; it need not exist yet")
    return _read_port(parser, words)


def _read_port(parser: argparse.ArgumentParser, words: Sequence[str], usual: int = 0) -> argparse.Namespace:
    what = f"port on 127.0.0.1; by default {usual or 'one that is free'}"
    parser.add_argument("--port", type=_port, default=usual, metavar="N", help=what)
    return parser.parse_args(words)


def _recipes(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    add = parser.add_argument
    add("action", metavar="show", nargs="?", help="print one recipe; without it all are listed")
    add("name", metavar="NAME", nargs="?", help="the recipe to print")
    arguments = parser.parse_args(words)
    if arguments.action and (arguments.action != "show" or not arguments.name):
        parser.error("to print a recipe write: llava-accel recipes show NAME, such as okvqa_qlora")
    return arguments


def _keys(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("name", metavar="TABLE", nargs="?", default="", help="a table such as optim, or one key")
    return parser.parse_args(words)


def _number(text: str, wanted: str, least: int, most: int) -> int:
    if not re.fullmatch(r"\d{1,10}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return int(text)


def _count(text: str) -> int:
    return _number(text, "a whole number from 0 on", 0, 10**9)


def _at_least_one(text: str) -> int:
    return _number(text, "a whole number from 1 on", 1, 10**9)


def _port(text: str) -> int:
    return _number(text, "a port. Write one from 1024 to 65535, or leave --port out", 0, 65535)


def _in_unicode(text: str) -> str:
    """A word of the command line, with ? for bytes that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _gigabytes(text: str) -> float:
    if not re.fullmatch(r"\d{0,5}(\.\d*)?", text) or not float(f"0{text}"):
        raise argparse.ArgumentTypeError(f"{text} is not the memory of one GPU in GB. Write a number, such as 24")
    return float(text)


def _add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None, reads_data: bool = True) -> None:
    """Add the recipe and its overrides. Where a verb reads the data, they must exist before anything is loaded."""
    add = parser.add_argument
    parser.set_defaults(reads_data=reads_data)
    add("recipe", metavar="RECIPE", nargs=nargs, help="a TOML file, for example recipes/okvqa_qlora.toml")
    add("overrides", metavar="table.key=value", nargs="*", default=[], help="change keys of the recipe")


VERBS = {
    "bench": Verb(
        "How fast a recipe trains here, and where its time goes.", "  llava-accel bench recipes/quickstart.toml", _bench
    ),
    "cache": Verb(
        "Write the vision tower's features of all images to disk, ahead of the run; or show or empty the cache.",
        "  llava-accel cache recipes/okvqa_qlora.toml\n  llava-accel cache --list",
        _cache,
    ),
    "chat": Verb(
        "Talk to a base or an adapter in the terminal, with images, in exactly the prompts that it was trained on.\n\n"
        "Commands: /image FILE adds an image to the next question, /system TEXT sets the system prompt of the next\n"
        "conversation, /reset starts one, /help shows all, /quit ends.",
        "  llava-accel chat --adapter runs/quickstart --image image.jpg\n"
        "  llava-accel chat --adapter runs/quickstart --web --collect data/mine.jsonl",
        _chat,
    ),
    "check": Verb(
        "Read all that a recipe names, without building the model: what is in it, what is wrong, what is learned from it.",
        "  llava-accel check recipes/okvqa_qlora.toml",
        _check,
    ),
    "evaluate": Verb(
        "Evaluate a base or an adapter on a recipe's held-out data, or score a file of predictions.",
        "  llava-accel evaluate recipes/quickstart.toml --adapter runs/quickstart",
        _evaluate,
    ),
    "export": Verb(
        "Export a run, a checkpoint or an adapter for peft, transformers or LLaVA's own code, or convert a base.",
        "  llava-accel export runs/quickstart --to merged --out runs/quickstart-merged\n"
        "A GPU is used where there is one; CUDA_VISIBLE_DEVICES= leaves the work to the CPU, in fp32.",
        _export,
    ),
    "init": Verb(
        "Write a first recipe that fits data, base and GPU, with the reason for each key.",
        "  llava-accel init mine.toml --data data/mine.jsonl --images data/images --gpu 24",
        _init,
    ),
    "keys": Verb(
        "Every key of a recipe: type, default and meaning.", "  llava-accel keys\n  llava-accel keys optim", _keys
    ),
    "plan": Verb(
        "What a run will take, before it is launched: memory on each GPU by kind, operations, steps, and the largest batch.",
        "  llava-accel plan recipes/okvqa_qlora.toml --gpu 24\n  llava-accel plan recipes/okvqa_qlora.toml --cards",
        _plan,
    ),
    "recipes": Verb(
        "List the recipes that ship, or print one.",
        "  llava-accel recipes\n  llava-accel recipes show okvqa_qlora > mine.toml",
        _recipes,
    ),
    "report": Verb(
        "Write the report of a run, or compare several, as one HTML file that needs no network.",
        "  llava-accel report runs/quickstart\n  llava-accel report runs/rank_16 runs/rank_128 --out comparison.html",
        _report,
    ),
    "serve": Verb(
        "Answer requests in the form of OpenAI's chat.completions, to try a model: one by one, greedily, on 127.0.0.1.\n\n"
        "Images are data: URLs. For real use: llava-accel export RUN --to merged --out DIR, and then vllm serve DIR.",
        "  llava-accel serve --adapter runs/quickstart",
        _serve,
    ),
    "train": Verb(
        "Fine-tune a LLaVA.",
        "  llava-accel train recipes/quickstart.toml\n"
        "  llava-accel train recipes/okvqa_qlora.toml --profile launch/zero3.yaml --num-processes 8 train.epochs=2",
        _train,
    ),
    "watch": Verb(
        "Serve the report of a run while it trains, on this machine alone, or a comparison of several runs.",
        "  llava-accel watch runs/quickstart\n  llava-accel watch runs/rank_16 runs/rank_128 --port 8765\n"
        "From elsewhere: ssh -L 8765:127.0.0.1:8765 MACHINE, and open http://127.0.0.1:8765/ there.",
        _watch,
    ),
}
"""All verbs but `prepare`, whose own module is light and has a parser for each source of data."""
