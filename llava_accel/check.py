"""Read all data of a recipe without the model: what is in it, what is wrong with it, what is learned from it.

Every record is tokenised and every picture decoded, in parallel. The examples that are shown are coloured by what the
model is trained to say: answers, and nothing else.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.text import Text

from llava_accel.data.corpus import Corpus
from llava_accel.data.labels import Example
from llava_accel.data.survey import Survey, survey
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.run.cli import read_recipe, recipe_parser, run
from llava_accel.run.console import Screen
from llava_accel.run.datasets import open_corpora

_SHOWN_ERRORS = 20
IGNORE_INDEX = -100


def check(recipe: Recipe, arguments: argparse.Namespace) -> bool:
    """Report on training and evaluation data.

    Returns:
        Whether every record can be trained on (or is left out by the recipe's own word).
    """
    screen = Screen()
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    ok = True
    for name, corpus in zip(("data.train", "data.eval"), open_corpora(recipe, processing), strict=True):
        if corpus is None:
            continue
        with screen.bar(f"reading {name}", len(corpus)) as bar:
            found = survey(corpus, workers=recipe.data.workers, decode=True, progress=bar.advance)
        summarise(screen, name, corpus, found)
        show_examples(screen, corpus, found, processing, arguments.show)
        ok &= not found.errors or recipe.data.on_bad_record == "skip"
        if arguments.labels and name == "data.train":
            write_labels(Path(arguments.labels), corpus, found)
            screen.line(f"labels of {len(found.usable)} records: {arguments.labels}")
        if arguments.fix:
            write_clean_copy(Path(arguments.fix), corpus, found, screen)
    if not ok and not arguments.fix:
        screen.line(
            f"next: mend the records, or write a copy without them: python -m llava_accel.check {arguments.recipe} "
            "--fix DIR"
        )
    elif ok:
        screen.line(f"next: accelerate launch -m llava_accel.train {arguments.recipe}")
    return ok


def summarise(screen: Screen, name: str, corpus: Corpus, found: Survey) -> None:
    """Print the table of counts, and the first errors in full."""
    lengths = found.lengths[found.usable]
    rows = [
        ["records", f"{len(corpus):,}"],
        ["usable", f"{len(found.usable):,}"],
        ["pictures", f"{int(found.num_images.sum()):,}"],
        ["turns", f"{int(found.num_turns.sum()):,}"],
        ["turns dropped to fit", f"{found.num_dropped_turns:,}"],
        ["targets", f"{int(found.num_targets.sum()):,}"],
    ]
    if len(lengths):
        quantiles = np.quantile(lengths, (0.0, 0.5, 0.95, 1.0)).astype(int)
        rows.append(["tokens: least, median, 95 %, most", ", ".join(f"{q:,}" for q in quantiles)])
    rows += [[f"unusable: {kind}", f"{count:,}"] for kind, count in sorted(found.errors_by_kind().items())]
    screen.table(name, ["", ""], rows)
    for error in list(found.errors.values())[:_SHOWN_ERRORS]:
        screen.line(f"  {error}")
    if len(found.errors) > _SHOWN_ERRORS:
        screen.line(f"  and {len(found.errors) - _SHOWN_ERRORS} more")


def show_examples(screen: Screen, corpus: Corpus, found: Survey, processing: Processing, count: int) -> None:
    """Print a few examples, spread over the data: what is learned in bold green between ⟦ and ⟧, pictures as one mark."""
    if not len(found.usable):
        return
    screen.line("examples (what the model learns to say stands between ⟦ and ⟧):")
    for place in np.linspace(0, len(found.usable) - 1, min(count, len(found.usable))).astype(int):
        example = corpus.encode(int(found.usable[place])).example
        prove_labels(example, processing.image_token_id)
        text = Text("  ")
        for ids, learned in runs(example, processing.image_token_id):
            shown = (
                str(processing.processor.tokenizer.decode(ids))
                if len(ids)
                else f"[{processing.num_image_tokens} image tokens]"
            )
            shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in shown)
            text.append(f"⟦{shown}⟧" if learned else shown, style="bold green" if learned else "dim")
        screen.console.print(text, soft_wrap=True)


def runs(example: Example, image_token_id: int) -> Iterator[tuple[list[int], bool]]:
    """Stretches of the example that are all learned or all not; a picture is an empty stretch."""
    ids, start = example.input_ids, 0
    kinds = np.where(ids == image_token_id, 2, example.is_target.astype(int))
    for end in [*(np.nonzero(np.diff(kinds))[0] + 1), len(ids)]:
        yield ([] if kinds[start] == 2 else ids[start:end].tolist()), bool(kinds[start] == 1)
        start = int(end)


def prove_labels(example: Example, image_token_id: int) -> None:
    """Hold what must never happen: no target at all, a target on a picture, a target without a token before it."""
    targets = example.input_ids[example.is_target]
    assert len(targets), "an example without a target reached the model"
    assert not np.any(targets == image_token_id), "an image token is a target"
    assert not example.is_target[0], "the first token is a target"


def write_labels(path: Path, corpus: Corpus, found: Survey) -> None:
    """One line a usable record: {"id", "input_ids", "labels"}; image tokens expanded, -100 elsewhere, not shifted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for row in found.usable:
            example = corpus.encode(int(row)).example
            labels = np.where(example.is_target, example.input_ids, IGNORE_INDEX)
            line = {
                "id": corpus.record(int(row)).id,
                "input_ids": example.input_ids.tolist(),
                "labels": labels.tolist(),
            }
            file.write(json.dumps(line) + "\n")


def write_clean_copy(folder: Path, corpus: Corpus, found: Survey, screen: Screen) -> None:
    """The usable records as JSON lines, and left_out.txt with the reason for each of the others.

    Pictures are not copied: the copy is used with the same data.images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in corpus.sources:
        target = folder / f"{source.table.path.stem}.jsonl"
        if target.exists() and target.resolve() == source.table.path.resolve():
            raise ValueError(f"--fix: {target} is the data itself. Name another folder")
        target.unlink(missing_ok=True)
    start = 0
    for source in corpus.sources:
        with (folder / f"{source.table.path.stem}.jsonl").open("ab") as file:
            for row in range(start, start + len(source.table)):
                if row not in found.errors:
                    file.write(corpus.raw(row) + b"\n")
        start += len(source.table)
    (folder / "left_out.txt").write_text("".join(f"{error}\n" for error in found.errors.values()))
    screen.line(
        f"clean copy: {folder} ({len(found.usable):,} records; {len(found.errors):,} left out, in left_out.txt)"
    )


def main() -> None:
    """Entry point of `python -m llava_accel.check`."""
    parser = recipe_parser(
        "check", (__doc__ or "").splitlines()[0], "python -m llava_accel.check recipes/okvqa_qlora.toml"
    )
    parser.add_argument("--labels", metavar="FILE.jsonl", help="write ids and labels of every record")
    parser.add_argument("--fix", metavar="DIR", help="write a clean copy and the list of what it leaves out")
    parser.add_argument("--show", metavar="N", type=int, default=3, help="examples to show (default 3)")
    arguments = parser.parse_intermixed_args()

    def verb() -> None:
        if not check(read_recipe(arguments), arguments):
            raise SystemExit(1)

    run(verb)


if __name__ == "__main__":
    main()
