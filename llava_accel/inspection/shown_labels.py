"""What the model is trained to say, for people and for programs: examples on the console, labels in a file."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.text import Text

from llava_accel.console.output import Console, printable
from llava_accel.data.corpus import Corpus
from llava_accel.data.labels import Example
from llava_accel.data.survey import Survey
from llava_accel.model.processing import Processing

IGNORE_INDEX = -100


def show_examples(console: Console, corpus: Corpus, found: Survey, processing: Processing, count: int) -> None:
    """Print a few examples, spread over the data: what is learned in bold green between ⟦ and ⟧, images as one mark."""
    if not len(found.usable):
        return
    console.line("examples (what the model learns to say stands between ⟦ and ⟧):")
    for place in np.linspace(0, len(found.usable) - 1, min(count, len(found.usable))).astype(int):
        for example in corpus.encode(int(found.usable[place])).examples:
            prove_labels(example, processing.image_token_id)
            console.rich.print(coloured(example, processing), soft_wrap=True)


def coloured(example: Example, processing: Processing) -> Text:
    """The example as text; behind an answer that is one of several stands its weight."""
    text = Text("  ")
    for ids, learned in runs(example, processing.image_token_id):
        shown = (
            str(processing.processor.tokenizer.decode(ids))
            if len(ids)
            else f"[{processing.num_image_tokens} image tokens]"
        )
        shown = printable(shown).replace("\n", "\\n")
        text.append(f"⟦{shown}⟧" if learned else shown, style="bold green" if learned else "dim")
    return text.append(f" x {example.weight:.2g}") if example.weight != 1 else text


def runs(example: Example, image_token_id: int) -> Iterator[tuple[list[int], bool]]:
    """Stretches of the example that are all learned or all not; an image is an empty stretch."""
    ids, start = example.input_ids, 0
    kinds = np.where(ids == image_token_id, 2, example.is_target.astype(int))
    for end in [*(np.nonzero(np.diff(kinds))[0] + 1), len(ids)]:
        yield ([] if kinds[start] == 2 else ids[start:end].tolist()), bool(kinds[start] == 1)
        start = int(end)


def prove_labels(example: Example, image_token_id: int) -> None:
    """Hold what must never happen: no target at all, a target on an image, a target without a token before it."""
    targets = example.input_ids[example.is_target]
    assert len(targets), "an example without a target reached the model"
    assert not np.any(targets == image_token_id), "an image token is a target"
    assert not example.is_target[0], "the first token is a target"


def write_labels(path: Path, corpus: Corpus, found: Survey) -> None:
    """One line a usable record: {"id", "input_ids", "labels"}; image tokens expanded, -100 elsewhere, not shifted.

    With data.answers = "weighted" a line for each answer, with its "weight".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for row in found.usable:
            for example in corpus.encode(int(row)).examples:
                labels = np.where(example.is_target, example.input_ids, IGNORE_INDEX)
                line = {
                    "id": corpus.record(int(row)).id,
                    "input_ids": example.input_ids.tolist(),
                    "labels": labels.tolist(),
                    **({"weight": example.weight} if example.weight != 1 else {}),
                }
                file.write(json.dumps(line) + "\n")
