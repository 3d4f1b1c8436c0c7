"""The sources of `llava-accel prepare`: for each its name, its flags, an example, and the function that converts it.

A new one is a row of `SOURCES`. This module is light, for `--help`: the converters import torch, and are imported only when
they run.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llava_accel.converters.entry import SHORT
from llava_accel.data.annotations import LETTER_REQUEST
from llava_accel.exceptions import UserError

if TYPE_CHECKING:
    from llava_accel.converters.faults import Part

_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
"""LLaVA-1.5's line for VizWiz, above that for short answers."""
_CAPTION = "Provide a one-sentence caption for the provided image."


@dataclass(frozen=True)
class Source:
    """A data set, or a form of data, that is converted.

    Args:
        about: What it is, the first line short; the help shows all of it.
        given: What the example needs.
        example: The arguments of a command, in lines.
        flags: The flags it takes, with a "!" after those that must be given.
        parts: Gives the parts to be written.
        suffix: The line below each question, unless --suffix names another.
        metric: The recipe's eval.metric that scores its answers, where it is not VQA accuracy.
    """

    about: str
    given: str
    example: tuple[str, ...]
    flags: str
    parts: Callable[[Namespace], Iterable["Part"]]
    suffix: str = SHORT
    metric: str = ""


def _pairs(given: Namespace) -> Iterable["Part"]:
    from llava_accel.converters.vqa_challenge import vqa_parts

    return vqa_parts(given.questions, given.annotations, given.split_name, given.images, given.suffix, given.out)


def _lists(given: Namespace) -> Iterable["Part"]:
    from llava_accel.converters.question_files import FORMS, question_parts

    form, suffix = FORMS[given.source], given.suffix
    if given.multiple_choice:
        form, suffix = FORMS[f"{given.source} choice"], LETTER_REQUEST if suffix == SHORT else suffix
    return question_parts(form, given.file, given.split_name, given.images, suffix, given.out)


def _science(given: Namespace) -> Iterable["Part"]:
    from llava_accel.converters.science_qa import science_parts

    return science_parts(given.problems, given.pid_splits, given.splits, given.images, given.explain, given.out)


def _captions(given: Namespace) -> Iterable["Part"]:
    from llava_accel.converters.coco_captions import caption_parts

    question = given.question or _CAPTION
    return caption_parts(given.file, given.split_name, given.images, question, given.one_per_image, given.out)


def _easy(given: Namespace) -> Iterable["Part"]:
    from llava_accel.converters.easy_vqa import easy_vqa_folder, easy_vqa_parts

    given.images = given.out / "images"
    return easy_vqa_parts(easy_vqa_folder(), given.out)


def _table(given: Namespace) -> Iterable["Part"]:
    from llava_accel.converters.csv_rows import Columns, csv_part

    if given.out.suffix != ".jsonl":
        raise UserError(f"--out is {given.out}. Name a file that ends in .jsonl.")
    if given.question and given.question_column:
        raise UserError("--question and --question-column: the question is one text, or it is in a column. Give one.")
    columns = Columns(
        images=given.image_column,
        question="" if given.question else given.question_column or "question",
        answers=given.answer_column,
        asked=given.question,
    )
    reading = {"encoding": given.encoding, "delimiter": given.delimiter or "", "suffix": given.suffix}
    return [csv_part(given.file, given.images, columns, out=given.out, say=print, **reading)]


def _hub(given: Namespace) -> Iterable["Part"]:
    from llava_accel.converters.hub_sets import hub_parts
    from llava_accel.data.row_forms import RowForm, named_columns

    given.images = given.out / "images"
    form = RowForm(tuple(named_columns(given.columns).items()))
    return hub_parts(given.set, given.config, given.split, form, given.out)


_PAIR_FLAGS = "questions! annotations! images! split-name suffix"
_LIST_FLAGS = "file! images! split-name suffix"
_VQAV2 = Source(
    "The official files of VQA v2 or v1, and others of that form.",
    "with the files of visualqa.org, and COCO's images in coco/",
    (
        "--questions v2_OpenEnded_mscoco_train2014_questions.json v2_OpenEnded_mscoco_val2014_questions.json",
        "--annotations v2_mscoco_train2014_annotations.json v2_mscoco_val2014_annotations.json",
        "--images coco --out data/vqav2",
    ),
    _PAIR_FLAGS,
    _pairs,
)
SOURCES: dict[str, Source] = {
    "okvqa": Source(
        "The official files of OK-VQA.",
        "with the files of okvqa.allenai.org, and COCO's images in coco/",
        (
            "--questions OpenEnded_mscoco_train2014_questions.json OpenEnded_mscoco_val2014_questions.json",
            "--annotations mscoco_train2014_annotations.json mscoco_val2014_annotations.json",
            "--images coco --out data/okvqa",
        ),
        _PAIR_FLAGS,
        _pairs,
    ),
    "vqav2": _VQAV2,
    "vqa": replace(_VQAV2, about="Another name for vqav2."),
    "aokvqa": Source(
        "The official files of A-OKVQA: direct answers, or with --multiple-choice the letters of options.\n\n"
        "Questions that are marked difficult_direct_answer are left out where direct answers are trained.",
        "with the files of aokvqa.allenai.org, and COCO's images of 2017 in coco/",
        ("--file aokvqa_v1p0_train.json aokvqa_v1p0_val.json", "--images coco --out data/aokvqa"),
        f"{_LIST_FLAGS} multiple-choice",
        _lists,
    ),
    "gqa": Source(
        "The official question files of GQA.\n\nA split in several files, such as train_all_questions, becomes one.",
        "with the files of questions1.2.zip and images.zip of GQA's page",
        ("--file train_balanced_questions.json testdev_balanced_questions.json", "--images images --out data/gqa"),
        _LIST_FLAGS,
        _lists,
        metric="exact_match",
    ),
    "vizwiz": Source(
        "The official files of VizWiz-VQA, unanswerable questions among them.",
        "with the files of Annotations.zip, train.zip and val.zip of vizwiz.org in vizwiz/",
        ("--file vizwiz/train.json vizwiz/val.json", "--images vizwiz --out data/vizwiz"),
        _LIST_FLAGS,
        _lists,
        suffix=f"{_UNANSWERABLE}\n{SHORT}",
    ),
    "textvqa": Source(
        "The official files of TextVQA.",
        "with the files of textvqa.org, and train_images/ in textvqa/",
        ("--file TextVQA_0.5.1_train.json TextVQA_0.5.1_val.json", "--images textvqa --out data/textvqa"),
        _LIST_FLAGS,
        _lists,
    ),
    "docvqa": Source(
        "The official files of DocVQA, task 1.\n\n"
        "Its answers are spellings that all count as right; the first is trained on.",
        "with the files of rrc.cvc.uab.es, and documents/ in docvqa/",
        ("--file train_v1.0_withQT.json val_v1.0_withQT.json", "--images docvqa --out data/docvqa"),
        _LIST_FLAGS,
        _lists,
        metric="anls",
    ),
    "chartqa": Source(
        "The official files of ChartQA.\n\nThe human and the augmented questions of a split become one file."
        " Relaxed\naccuracy allows their numbers 5 %.",
        "in a copy of github.com/vis-nlp/ChartQA",
        (
            "--file 'ChartQA Dataset/train/train_human.json' 'ChartQA Dataset/train/train_augmented.json'",
            "--file 'ChartQA Dataset/val/val_human.json' 'ChartQA Dataset/val/val_augmented.json'",
            "--images 'ChartQA Dataset' --out data/chartqa",
        ),
        _LIST_FLAGS,
        _lists,
        metric="relaxed_accuracy",
    ),
    "scienceqa": Source(
        "The official files of ScienceQA, in LLaVA's prompts; many problems have no image.\n\n"
        "The letter of the right option is trained on, as LLaVA-1.5 is asked for it; with --explain lecture, solution and\n"
        '"The answer is B.", as LLaVA was trained.',
        "with data/scienceqa of github.com/lupantech/ScienceQA, and its images in scienceqa/images/",
        (
            "--problems scienceqa/problems.json --pid-splits scienceqa/pid_splits.json",
            "--images scienceqa/images --out data/scienceqa",
        ),
        "problems! pid-splits! splits images! explain",
        _science,
        metric="multiple_choice",
    ),
    "coco-captions": Source(
        "The official caption files of COCO.\n\n"
        "One record per caption, so that all five captions of an image are trained on, and none of them sees another. For\n"
        "evaluation --one-per-image asks once per image, and keeps its captions as answers.",
        "with the files of annotations_trainval2017.zip, and train2017/ and val2017/ in coco/",
        ("--file captions_train2017.json captions_val2017.json", "--images coco --out data/coco-captions"),
        "file! images! split-name question one-per-image",
        _captions,
        metric="cider",
    ),
    "easy-vqa": Source(
        "The package easy-vqa: a small data set to try things with.",
        "after `python -m pip install easy-vqa`: 48,248 questions on 5,000 drawings",
        ("--out data/easy-vqa",),
        "",
        _easy,
    ),
    "hf": Source(
        "A data set of the Hugging Face hub, or a file or folder that data.train reads, as JSON lines and image files.\n\n"
        "A recipe reads it as it is: this is for those who want to look at it or change it.",
        "with a data set of the hub",
        ("--set org/name --split train validation --out data/name",),
        "set! config split columns",
        _hub,
    ),
    "csv": Source(
        "A table with an image, a question and an answer in each row.\n\n"
        "The encoding and the character between the cells are detected, and printed. With several image columns a record\n"
        "has several images; with several answer columns each holds one annotator's answer.",
        "for a table with the columns photo, question and label",
        ("--file labels.csv --images photos --out data/labels.jsonl", "--image-column photo --answer-column label"),
        "table! images! image-column question-column question answer-column encoding delimiter suffix",
        _table,
        suffix="",
    ),
}
