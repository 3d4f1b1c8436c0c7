"""`llava-accel prepare`: public data sets and tables -> the JSON lines that data.train reads."""

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava_accel.exceptions import UserError

_COMMAND = "llava-accel prepare"
_SUFFIX = "Answer the question using a single word or phrase."  # LLaVA-1.5's prompt for short answers

_OKVQA_EXAMPLE = f"""example, with the files of okvqa.allenai.org, and COCO's images in coco/:
  {_COMMAND} okvqa \\
    --questions OpenEnded_mscoco_train2014_questions.json OpenEnded_mscoco_val2014_questions.json \\
    --annotations mscoco_train2014_annotations.json mscoco_val2014_annotations.json \\
    --images coco --out data/okvqa
"""
_VQA_EXAMPLE = f"""example, with the files of visualqa.org, and COCO's images in coco/:
  {_COMMAND} vqa \\
    --questions v2_OpenEnded_mscoco_train2014_questions.json v2_OpenEnded_mscoco_val2014_questions.json \\
    --annotations v2_mscoco_train2014_annotations.json v2_mscoco_val2014_annotations.json \\
    --images coco --out data/vqa
"""
_CSV_EXAMPLE = f"""example, for a table with the columns photo, question and label:
  {_COMMAND} csv --file labels.csv --images photos --out data/labels.jsonl \\
    --image-column photo --answer-column label
"""
_EASY_VQA_EXAMPLE = f"""example, after `python -m pip install easy-vqa`: 48,248 questions on 5,000 drawings
  {_COMMAND} easy-vqa --out data/easy-vqa
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; what the user can mend ends it with one line instead of a traceback."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


# The converters are imported where they run: torch comes with them, and `--help` should not wait for it.


def _vqa(arguments: argparse.Namespace) -> None:
    from llava_accel.converters.vqa_challenge import read_vqa_pair, vqa_records
    from llava_accel.storage.jsonl import write_json_lines

    questions, annotations, names = arguments.questions, arguments.annotations, arguments.split_name
    if len(questions) != len(annotations):
        raise UserError(
            f"--questions names {len(questions)} file(s), --annotations {len(annotations)}. "
            "Give one annotations file for each questions file, in the same order."
        )
    if names and len(names) != len(questions):
        raise UserError(f"--split-name gives {len(names)} name(s) for {len(questions)} pair(s). Give one a pair.")
    written: dict[str, Path] = {}
    for place, files in enumerate(zip(questions, annotations, strict=True)):
        pair = read_vqa_pair(*files)
        split = names[place] if names else pair.split
        if split in written:
            raise UserError(f"{files[0]}: a second split {split!r}. Give --split-name, one name a pair.")
        written[split] = arguments.out / f"{split}.jsonl"
        count = write_json_lines(vqa_records(pair, arguments.images, arguments.suffix), written[split])
        num_images = len({question.image_id for question in pair.questions.values()})
        print(f"{written[split]}: {count} questions on {num_images} images")
    _print_next("okvqa_qlora", written, arguments.images)


def _csv(arguments: argparse.Namespace) -> None:
    from llava_accel.converters.formats import csv_records
    from llava_accel.storage.jsonl import write_json_lines

    if arguments.out.suffix != ".jsonl":
        raise UserError(f"--out is {arguments.out}. Name a file that ends in .jsonl.")
    records = csv_records(
        arguments.file,
        arguments.images,
        image_column=arguments.image_column,
        question_column=arguments.question_column,
        answer_column=arguments.answer_column,
        delimiter=arguments.delimiter,
        suffix=arguments.suffix,
    )
    print(f"{arguments.out}: {write_json_lines(records, arguments.out)} questions")
    _print_next("finetune_lora", {"train": arguments.out}, arguments.images)


def _easy_vqa(arguments: argparse.Namespace) -> None:
    from llava_accel.converters.formats import convert_easy_vqa, easy_vqa_folder

    counts = convert_easy_vqa(easy_vqa_folder(), arguments.out)
    files = {split: arguments.out / f"{split}.jsonl" for split in counts}
    for split, file in files.items():
        print(f"{file}: {counts[split]} questions")
    _print_next("quickstart", files, arguments.out / "images")


def _print_next(recipe: str, files: Mapping[str, Path], images: Path) -> None:
    """The command that checks the new files: "train", else the first, is trained on, the next evaluated."""
    ordered = [files[split] for split in sorted(files, key=lambda split: split != "train")]
    overrides = [f"data.{use}={file}" for use, file in zip(("train", "eval"), ordered, strict=False)]
    command = ["python", "-m", "llava_accel.check", f"recipes/{recipe}.toml", *overrides, f"data.images={images}"]
    print(f"next: {shlex.join(command)}")


def _delimiter(text: str) -> str:
    character = {"tab": "\t", "\\t": "\t"}.get(text, text)
    if len(character) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one character; use , or ; or tab")
    return character


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter  # keeps the lines of the examples
    about = "Turns public data sets and tables into the JSON lines that data.train reads."
    parser = argparse.ArgumentParser(_COMMAND, description=about, epilog=_OKVQA_EXAMPLE, formatter_class=layout)
    sources = parser.add_subparsers(title="sources", required=True, metavar="SOURCE")

    def source(
        name: str, about: str, example: str, run: Callable[[argparse.Namespace], None], out: str
    ) -> argparse.ArgumentParser:
        added = sources.add_parser(name, help=about, description=about, epilog=example, formatter_class=layout)
        added.set_defaults(run=run)
        added.add_argument("--out", required=True, type=Path, metavar=out, help="where the JSON lines go")
        return added

    for name, about, example in (
        ("okvqa", "The official files of OK-VQA.", _OKVQA_EXAMPLE),
        ("vqa", "The official files of VQA v1 or v2, and others of that form.", _VQA_EXAMPLE),
    ):
        vqa = source(name, about, example, _vqa, "DIR")
        for flag, what in (("--questions", "questions files"), ("--annotations", "their annotations, in order")):
            vqa.add_argument(flag, nargs="+", action="extend", required=True, type=Path, metavar="F.json", help=what)
        images = "folder of the images, or the one above it"
        vqa.add_argument("--images", required=True, type=Path, metavar="DIR", help=images)
        names = "names of the outputs, one a pair of files (default: as the files say)"
        vqa.add_argument("--split-name", nargs="+", action="extend", metavar="NAME", help=names)
        below = "line below each question, '' for none (default: %(default)s)"
        vqa.add_argument("--suffix", default=_SUFFIX, help=below)

    table = source("csv", "A table: one image, question and answer a row.", _CSV_EXAMPLE, _csv, "F.jsonl")
    table.add_argument("--file", required=True, type=Path, metavar="F.csv", help="in UTF-8, with a header")
    images = "folder that image names are relative to"
    table.add_argument("--images", required=True, type=Path, metavar="DIR", help=images)
    for column in ("image", "question", "answer"):
        table.add_argument(f"--{column}-column", default=column, metavar="NAME", help="(default: %(default)s)")
    between = "character between cells: , or ; or tab (default: ,)"
    table.add_argument("--delimiter", default=",", type=_delimiter, help=between)
    table.add_argument("--suffix", default="", help="line below each question (default: none)")

    about = "The package easy-vqa: a small data set to try things with."
    source("easy-vqa", about, _EASY_VQA_EXAMPLE, _easy_vqa, "DIR")
    return parser


if __name__ == "__main__":
    main()
