"""Finds out what is in the data: reads rows once without a tokenizer, and some of them with one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from llava_accel.console.output import counted
from llava_accel.data.conversation import IMAGE
from llava_accel.data.corpus import Corpus
from llava_accel.data.images import check_images
from llava_accel.data.records import Record
from llava_accel.data.spread import spread
from llava_accel.recipe.paths import with_images
from llava_accel.sources.flags import in_flags
from llava_accel.sources.problems import DataError

_MOST_ROWS = 100_000
"""Rows that are read; of a larger corpus, blocks that are spread over all of it."""
_BLOCK = 1000  # rows in a block: records of one image are usually neighbours
_LONGEST, _SPREAD = 192, 576  # rows that are tokenised
_IMAGE_BYTES = 2000  # bytes of text that make as many tokens as an image
_SHORT_WORDS = 5
_FEW_ROWS = 20  # enough to see how all name their images
_FEW_QUESTIONS, _FEW_ANSWERS = 20, 100

PREFERENCE = "preference"
"""The task of pairs of answers."""
_AS_FLAGS = {
    "data.train and data.eval": "--data and --eval",
    "set data.images to a folder": "give --images a folder",
    "set data.images": "give its folder with --images DIR",
    "data.images": "--images",
    'train.objective = "dpo"': "--task preference",
    "data.columns.": "--columns ",
}
"""Words of errors about keys -> the same for the command line of `init`; longer ones first."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found in the rows of a corpus. Arrays have one entry for each row that was read and can be used."""

    num_records: int
    num_read: int
    rows: Int[np.ndarray, "read"]
    sizes: Int[np.ndarray, "read"]
    """Bytes of text, images counted as text of as many tokens."""
    answer_words: Int[np.ndarray, "read"]
    rounds: Int[np.ndarray, "read"]
    num_with_images: int
    num_images: int
    num_sets: int
    """Different sets of images that records show."""
    num_questions: int
    """Different questions."""
    num_answers: int
    """Different answers."""
    num_pairs: int
    """Records with a rejected answer."""
    have_answers: bool
    have_choices: bool
    errors: tuple[DataError, ...]

    @property
    def is_short(self) -> bool:
        """Whether nine answers of ten have a few words."""
        return bool(np.quantile(self.answer_words, 0.9) <= _SHORT_WORDS)

    @property
    def are_pairs(self) -> bool:
        """Whether all records have a rejected answer."""
        return self.num_pairs == len(self.rows)

    @property
    def per_image(self) -> float:
        """Records on the same images, on average over those that show any."""
        return self.num_with_images / max(1, self.num_sets)

    @property
    def num_groups(self) -> int:
        """Sets of images, and records without any."""
        return self.num_sets + len(self.rows) - self.num_with_images


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of the rows that were tokenised; each array has an entry for each of them."""

    rows: Int[np.ndarray, "rows"]
    tokens: Int[np.ndarray, "rows"]
    answer_tokens: Int[np.ndarray, "rows"]
    """Tokens of the last answer, its end included."""
    tiles: Int[np.ndarray, "rows"]
    """Squares that the vision tower sees."""
    errors: tuple[DataError, ...]


def look(corpus: Corpus) -> Findings:
    """Read the rows; no image is opened, and nothing is tokenised.

    Raises:
        DataError: no row can be used.
    """
    rows = _rows_to_read(len(corpus))
    kept, sizes, words, rounds = [], [], [], []
    sets, images = set[tuple[Path, tuple[str, ...]]](), set[tuple[Path, str]]()
    questions, answers = set[str](), set[str]()
    errors: list[DataError] = []
    with_images = with_answers = with_choices = num_pairs = 0
    for row in rows.tolist():
        try:
            record = corpus.record(row)
        except DataError as error:
            errors.append(error)
            continue
        kept.append(row)
        sizes.append(sum(len(turn.text.encode()) for turn in record.turns) + _IMAGE_BYTES * len(record.images))
        words.append(len(record.turns[-1].text.split()))
        rounds.append(sum(turn.role == "assistant" for turn in record.turns))
        if record.images:
            root = corpus.root(row)
            sets.add((root, record.images))
            images.update((root, name) for name in record.images)
        questions.add(_question(record))
        answers.add(record.turns[-1].text.strip().lower())
        with_images += bool(record.images)
        with_answers += bool(record.answers)
        with_choices += bool(record.choices)
        num_pairs += record.is_pair
    if not kept:
        raise errors[0].with_note(f"None of the {len(rows):,} records that were read can be used")
    return Findings(
        num_records=len(corpus),
        num_read=len(rows),
        rows=np.array(kept),
        sizes=np.array(sizes),
        answer_words=np.array(words),
        rounds=np.array(rounds),
        num_with_images=with_images,
        num_images=len(images),
        num_sets=len(sets),
        num_questions=len(questions),
        num_answers=len(answers),
        num_pairs=num_pairs,
        have_answers=with_answers == len(kept),
        have_choices=with_choices == len(kept),
        errors=tuple(errors),
    )


def measure(corpus: Corpus, findings: Findings) -> Lengths:
    """Tokenise the longest rows and some that are spread over the others; read their images' headers.

    Args:
        corpus: With an `Encoder`.

    Raises:
        DataError: most of these rows cannot be used.
    """
    longest = np.argsort(-findings.sizes, kind="stable")[:_LONGEST]
    places = np.unique(np.concatenate([longest, spread(len(findings.rows), _SPREAD)]))
    rows, tokens, answer_tokens, tiles, errors = [], [], [], [], []
    for row in findings.rows[places].tolist():
        try:
            encoded = corpus.encode(row)
            check_images(corpus.image_files(row), False)
        except DataError as error:
            errors.append(corpus.locate(error, row))
            continue
        rows.append(row)
        tokens.append(encoded.length)
        answer_tokens.append(_last_run(encoded.example.is_target))
        tiles.append(encoded.example.num_tiles)
    if len(errors) >= len(places) / 2:
        note = f"{len(errors):,} of {len(places):,} records that were looked at cannot be used"
        raise errors[0].with_note(note)
    return Lengths(
        rows=np.array(rows),
        tokens=np.array(tokens),
        answer_tokens=np.array(answer_tokens),
        tiles=np.array(tiles),
        errors=tuple(errors),
    )


def guess_task(findings: Findings) -> tuple[str, str]:
    """One of the choices of `init --task`, and why."""
    words, rounds = int(np.median(findings.answer_words)), float(findings.rounds.mean())
    questions, answers = findings.num_questions, findings.num_answers
    if findings.are_pairs:
        return PREFERENCE, "all records have a rejected answer beside the chosen one"
    if findings.have_choices:
        return "vqa", "all records have choices"
    if findings.have_answers:
        return "vqa", "all records have the answers of annotators"
    if rounds >= 1.5:
        return "chat", f"a record has {rounds:.1f} questions on average"
    if not findings.is_short:
        if questions <= max(_FEW_QUESTIONS, len(findings.rows) // 20):
            return "caption", f"answers of about {words} words to {counted(questions, 'wording')} of the question"
        return "chat", f"answers of about {words} words to {counted(questions, 'different question')}"
    if questions <= _FEW_QUESTIONS and answers <= min(_FEW_ANSWERS, len(findings.rows) // 3):
        return "classify", f"{counted(answers, 'different short answer')} to {counted(questions, 'question')}"
    return "vqa", f"short answers to {counted(questions, 'different question')}"


def of_init(error: DataError, images: str = "") -> DataError:
    """The error with the flags of `init` in place of a recipe's keys, and with the folder that --images names."""
    worded = in_flags(error, _AS_FLAGS)
    return replace(worded, remedy=with_images(worded.remedy, images))


def lacks_marks(corpus: Corpus) -> bool:
    """Whether some records name images, and none of them says in its text where they belong."""
    num_unmarked = 0
    for row in spread(len(corpus), _FEW_ROWS):
        try:
            if corpus.record(row).images:
                return False
        except DataError as error:
            num_unmarked += "data.missing_image_mark" in error.remedy
    return num_unmarked > 0


def names_of_images(corpus: Corpus, most: int = _FEW_ROWS) -> Iterator[str]:
    """Image names of a few records that are spread over the data; records that cannot be read are left out."""
    for row in spread(len(corpus), most):
        try:
            yield from corpus.record(row).images
        except DataError:
            continue


def _rows_to_read(number: int) -> Int[np.ndarray, "rows"]:
    if number <= _MOST_ROWS:
        return np.arange(number)
    starts = np.linspace(0, number - _BLOCK, _MOST_ROWS // _BLOCK).astype(int)
    return np.unique((starts[:, None] + np.arange(_BLOCK)).ravel())


def _question(record: Record) -> str:
    return next(turn.text for turn in record.turns if turn.role == "user").replace(IMAGE, "").strip()


def _last_run(is_target: np.ndarray) -> int:
    """Length of the last run of true values."""
    (targets,) = np.nonzero(is_target)
    (gaps,) = np.nonzero(np.diff(targets) > 1)
    return len(targets) - (int(gaps[-1]) + 1 if len(gaps) else 0)
