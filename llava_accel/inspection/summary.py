"""What `check` prints of data.train or data.eval: counts, lengths, answers, errors by kind, and a few examples."""

from collections.abc import Sequence
from dataclasses import replace

from llava_accel.console.output import Console
from llava_accel.data.spread import spread
from llava_accel.data.survey import Survey
from llava_accel.inspection.data_facts import Checked, Share, answer_shares, examples_of_errors, length_shares, numbers
from llava_accel.inspection.learned import coloured
from llava_accel.inspection.repeated_ids import repeated_id
from llava_accel.recipe import DataTable
from llava_accel.sources.problems import quoted

_SHOWN_REPEATS = 3  # records with a repeated id: not an error, as LLaVA's own mixture has many
_BAR = 28  # columns
_ANSWER = 26
_FEW = 2  # records; with fewer no share says anything


def summarise(console: Console, checked: Checked) -> None:
    """Print counts, lengths and answers, and the first few errors of each kind."""
    errors, repeated = examples_of_errors(checked), list(checked.repeated.items())
    rows = [[name, value] for name, value in numbers(checked).items()]
    rows += [[f"unusable: {kind}", f"{count:,}"] for kind, (count, _) in errors.items()]
    console.table(checked.name, ["", ""], rows)
    if checked.processing:
        _show_shares(console, "tokens of a record", length_shares(checked.survey.lengths[checked.survey.usable]))
    _show_answers(console, checked)
    for kind, (count, messages) in errors.items():
        _show_some(console, kind, messages, count)
    if too_long := [error.tokens for error in checked.survey.errors.values() if error.tokens]:
        console.line(f"  too_long: data.max_length = {max(too_long)} takes all of them")
    first = [str(repeated_id(checked.corpus, row, known)) for row, known in repeated[:_SHOWN_REPEATS]]
    _show_some(console, "duplicate_id", first, len(repeated))


def _show_some(console: Console, kind: str, messages: Sequence[str], count: int) -> None:
    for line in messages:
        console.line(f"  {line}")
    if count > len(messages):
        console.line(f"  {kind}: and {count - len(messages):,} more, all listed by --fix DIR")


def _show_shares(console: Console, title: str, shares: list[Share]) -> None:
    """Print a line of less than 80 columns for each."""
    if sum(share.count for share in shares) < _FEW:
        return
    most, width = max(share.share for share in shares), max(len(share.name) for share in shares)
    console.line(f"{title}:")
    for share in shares:
        bar = "#" * max(round(_BAR * share.share / most), share.count > 0)
        console.line(f"  {share.name:<{width}}  {bar:<{_BAR}} {share.count:>10,} {share.share:>7.1%}")


def _show_answers(console: Console, checked: Checked) -> None:
    number, shares = answer_shares(checked)
    if not number or shares[0].count == 1:  # captions
        return
    shown = [replace(share, name=_short(quoted(share.name))) for share in shares]
    _show_shares(console, f"answers, {number:,} different (the commonest alone scores {shares[0].share:.1%})", shown)


def _short(text: str) -> str:
    return text if len(text) <= _ANSWER else f"{text[: _ANSWER - 1]}…"


def image_remarks(survey: Survey, data: DataTable) -> list[str]:
    """Remarks on images that the model sees otherwise than other programs show them."""
    said: list[str] = []
    if count := survey.traits["turned"]:
        how = {
            "ignore": "They are read as they are stored, as LLaVA does; most programs, and load_image of transformers, "
            'turn them. To train on what those show, set data.exif = "apply"',
            "apply": 'They are turned, as data.exif = "apply" says; LLaVA does not turn them',
        }[data.exif]
        said.append(f"{count:,} images have an EXIF orientation by which they are to be turned. {how}")
    if count := survey.traits["transparent"]:
        said.append(
            f"{count:,} images are transparent in parts, and are read with the colours that are hidden there, as LLaVA "
            'does. Processors of transformers put them on white: give them image.convert("RGBA").convert("RGB")'
        )
    return said


def show_examples(console: Console, checked: Checked, count: int) -> None:
    """Print a few examples, spread over the data: what is learned in bold green between ⟦ and ⟧, images as one mark."""
    processing, usable = checked.processing, checked.survey.usable
    if processing is None or not len(usable):
        return
    is_pair = checked.corpus.form.pairs
    learned = "prefers the first of two answers" if is_pair else "learns to write what is"
    console.line(f"examples (the model {learned} between ⟦ and ⟧):")
    for row in usable[spread(len(usable), count)].tolist():
        for example in checked.corpus.encode(row).examples:
            console.rich.print(coloured(example, processing), soft_wrap=True)
