"""A first recipe for data, a base and a card: looks at the data, plans what fits, and writes each key with its reason.

Most keys of a recipe have good defaults; it writes only those that depend on what the user has.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("init")  # before the imports below, so that help and mistakes are answered at once


import argparse
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_accel.advice.commented import Key, run_name, to_commented
from llava_accel.advice.findings import Findings, guess_task, lacks_marks, look, measure, names_of_images, of_init
from llava_accel.advice.folders import find_folder
from llava_accel.advice.proposal import (
    Named,
    Seen,
    global_batch,
    held_out_share,
    largest,
    length_keys,
    propose,
    shares_images,
    task_keys,
)
from llava_accel.advice.sizing import Card, Fit, find_card, size
from llava_accel.advice.stand_in import DEFAULT_BASE, choose_name, find_configs, known_template, load_configs
from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus, Source, open_sources
from llava_accel.data.examples import find_images
from llava_accel.data.row_forms import RowForm, named_columns
from llava_accel.exceptions import UserError
from llava_accel.model.processing import Processing
from llava_accel.recipe import make_recipe
from llava_accel.setup.datasets import build_encoder, entries, row_form
from llava_accel.sources.named import Named as NamedSource
from llava_accel.sources.named import held_out_split
from llava_accel.sources.problems import DataError
from llava_accel.storage.atomic import atomic_file, check_out
from llava_accel.storage.kept_files import cache_folder

_UNLIMITED = 10**9


def init(arguments: argparse.Namespace, console: Console) -> None:
    """Write the recipe, and say what was seen and what comes next.

    Raises:
        UserError: the file exists already, the data or the base cannot be used, or nothing fits the card.
    """
    out = Path(arguments.out)
    check_out(out, "NEW.toml:", "recipe.toml")
    if out.exists() and not arguments.force:
        raise UserError(f"{out} is there already. Name another file, or write over it with --force")
    card = find_card(arguments.gpu)
    named = name_data(arguments, console)
    sources = _open(named)
    form = RowForm(tuple(named.columns.items()), named.missing_image_mark)
    findings = look(Corpus(sources["data.train"], find_images, form))
    evaluation = look(Corpus(sources["data.eval"], find_images, form)) if named.evaluation else None
    task, why = (arguments.task, "as --task says") if arguments.task else guess_task(findings)
    seen, fit, assumed = fit_base(named, sources, findings, evaluation, task, card)
    head = [
        f"Written by `llava-accel init` for {findings.num_records:,} records and {card.name}.",
        "Change what you like: `llava-accel keys` lists every key, `llava-accel plan` computes memory and steps again.",
        *([assumed] if assumed else []),
    ]
    with atomic_file(out) as file:
        file.write_text(to_commented(head, propose(named, seen, fit, card)), encoding="utf-8")
    for line in [*saw(seen, card, why), *([assumed] if assumed else []), f"wrote {out}, with the reason for each key"]:
        console.line(line)
    console.line("next:")
    for line in commands(out, named.name, bool(named.evaluation or held_out_share(findings)[0])):
        console.line(f"  {line}")


def fit_base(
    named: Named,
    sources: dict[str, list[Source]],
    findings: Findings,
    evaluation: Findings | None,
    task: str,
    card: Card,
) -> tuple[Seen, Fit, str]:
    """Look at the data with the base's tokenizer, and plan what fits the card.

    Returns:
        All that was found, what fits, and what was assumed of the base.

    Raises:
        UserError: data or base cannot be used, or nothing fits.
    """
    with tempfile.TemporaryDirectory() as spare:
        folder, assumed = find_configs(named.base, Path(spare))
        processing = load_configs(folder)
        template = known_template(processing) if assumed else choose_name(processing)
        tried = "v1" if assumed else template[0]  # the tokenizer in this package has only the tokens of "v1"
        if tried != "v1":
            processing = load_configs(folder, tried)
        trial = _trial(named, folder, tried, [Key("max_length", _UNLIMITED, "")], task)
        lengths = measure(_corpus(trial, processing, sources["data.train"]), findings)
        seen = Seen(
            train=findings,
            lengths=lengths,
            evaluation=evaluation,
            evaluation_lengths=measure(_corpus(trial, processing, sources["data.eval"]), evaluation)
            if evaluation
            else None,
            task=task,
            template=template,
            window=int(processing.base.text.max_position_embeddings),
        )
        trial = _trial(named, folder, tried, length_keys(seen), task)
        corpus = _corpus(trial, processing, sources["data.train"])
        fit = size(trial, processing, corpus, largest(seen), card, global_batch(findings)[0])
    return seen, fit, assumed and f"{assumed}. Once the base is there, run init again with --force"


def name_data(arguments: argparse.Namespace, console: Console) -> Named:
    """The data and base that the command line names, with the folders of images if these are obvious.

    Raises:
        DataError: a file cannot be read.
        UserError: a word of --columns is not OURS=THEIRS.
    """
    folders, own = {}, {}
    columns = named_columns(arguments.columns)
    form, lacking = RowForm(tuple(columns.items())), False
    for path in filter(None, [*arguments.data, arguments.eval]):
        sources = open_sources([NamedSource(path, arguments.images)], cache_folder())
        lacking |= lacks_marks(Corpus(sources, find_images, form))
        folders[path], own[path] = _images_of(path, sources, arguments.images, form, console)
    if lacking:
        console.line("no text has <image>: images come before the first question (data.missing_image_mark)")
    is_one = len(arguments.data) == 1 and len({*own.values()}) == 1
    train: Any = arguments.data[0]
    # A data set with splits may have one to evaluate on.
    evaluation = train if not arguments.eval and len(arguments.data) == 1 and held_out_split(train) else arguments.eval
    images = folders[train]
    if not is_one:
        train = [{"path": path, "images": own[path], "weight": 1.0} for path in arguments.data]
        images = own[arguments.eval] if arguments.eval else ""
    return Named(
        name=run_name(Path(arguments.out).stem),
        base=arguments.base or DEFAULT_BASE,
        base_why="" if arguments.base else "no --base: this one needs no login, and published results are of it",
        train=train,
        images=images,
        images_why="as --images says" if arguments.images else "no --images: they were found there",
        evaluation=evaluation,
        columns=columns,
        missing_image_mark="start" if lacking else "error",
    )


def saw(seen: Seen, card: Card, why: str) -> list[str]:
    """Lines on what was found."""
    findings, lengths = seen.train, seen.lengths
    lines = [
        f"data: {findings.num_records:,} records, {findings.num_images:,} images"
        + (f", {findings.per_image:.1f} records an image" if shares_images(findings) else ""),
        f"task: {seen.task} ({why})",
        f"lengths: at most {int(lengths.tokens.max()):,} tokens in {len(lengths.rows):,} records that were tokenised",
        f"sized for {card.name}",
    ]
    if findings.num_read < findings.num_records:
        lines.insert(1, f"of these {findings.num_read:,} were read, spread over all")
    wrong = [*findings.errors, *lengths.errors]
    if wrong:
        count = f"{len(wrong):,} records" if len(wrong) > 1 else "a record"
        lines.append(
            f"note: {count} cannot be used, such as {of_init(wrong[0])}. `check` lists all; --fix writes a copy without them"
        )
    return lines


def commands(out: Path, name: str, has_evaluation: bool) -> list[str]:
    """The commands that come next, for the shell."""
    adapter = ["--adapter", f"runs/{name}"]
    last = ["evaluate", str(out), *adapter] if has_evaluation else ["chat", *adapter]
    return [shlex.join(["llava-accel", *words]) for words in (["check", str(out)], ["train", str(out)], last)]


def _images_of(path: str, sources: list[Source], given: str, form: RowForm, console: Console) -> tuple[str, str]:
    """The folder of a file's images as the recipe names it, "" if that is the file's own; and the folder itself."""
    if given:
        return given, given
    names = list(names_of_images(Corpus(sources, find_images, replace(form, missing_image_mark="start"))))
    folder = find_folder(names, sources[0].images) if names else None
    if folder is None:
        return "", str(sources[0].images)
    console.line(f"--images was not given: the images of {path} are in {folder}")
    return str(folder), str(folder)


def _open(named: Named) -> dict[str, list[Source]]:
    tables = _trial(named, "base", "v1", [])
    return {name: open_sources(each, cache_folder()) for name, each in entries(make_recipe(tables).data).items()}


def _trial(named: Named, folder: str, template: str, keys: Sequence[Key], task: str = "") -> dict[str, dict[str, Any]]:
    """Tables of a recipe on the configs that were found, as far as examples and their lengths depend on them."""
    data = {
        "train": named.train,
        "images": named.images,
        "columns": named.columns,
        "missing_image_mark": named.missing_image_mark,
        "eval": named.evaluation,
    }
    asked = {name: {key.name: key.value for key in keys} for name, keys in task_keys(task).items()}
    lora = {"lora": asked.pop("model.lora")} if asked else {}
    return asked | {
        "run": {"name": named.name},
        "model": {**asked.get("model", {}), **lora, "base": folder, "template": template},
        "data": data | {key.name: key.value for key in keys},
    }


def _corpus(tables: dict[str, dict[str, Any]], processing: Processing, sources: list[Source]) -> Corpus:
    recipe = make_recipe(tables)
    return Corpus(sources, build_encoder(recipe, processing), row_form(recipe))


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel init NEW.toml`."""
    try:
        init(arguments, Console())
    except DataError as error:
        raise of_init(error, arguments.images) from error
