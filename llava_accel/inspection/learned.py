"""Shows which parts of an example are learned: in colour on the console, and as ids and labels in a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from rich.text import Text

from llava_accel.console.output import printable
from llava_accel.data.corpus import Corpus
from llava_accel.data.labels import Example
from llava_accel.model.processing import Processing
from llava_accel.storage.jsonl import write_json_lines

Run = tuple[str, Literal["image", "given", "learned"]]


def coloured(example: Example, processing: Processing) -> Text:
    """The example as text, learned parts in bold green between ⟦ and ⟧; the weight of one of several answers follows."""
    text = Text("  ")
    for shown, kind in runs(example, processing):
        shown = shown if kind == "image" else printable(shown).replace("\n", "\\n")
        is_learned = kind == "learned"
        text.append(f"⟦{shown}⟧" if is_learned else shown, style="bold green" if is_learned else "dim")
    return text.append(f" x {example.weight:.2g}") if example.weight != 1 else text


def runs(example: Example, processing: Processing) -> Iterator[Run]:
    """Stretches of the example, each all learned or all not, decoded; an image as the number of its tokens."""
    _check_labels(example, processing.image_token_id)
    ids, start = example.input_ids, 0
    kinds = np.where(ids == processing.image_token_id, 2, example.is_target.astype(int))
    for end in [*(np.nonzero(np.diff(kinds))[0] + 1).tolist(), len(ids)]:
        if kinds[start] == 2:
            yield f"[{end - start} image tokens]", "image"
        else:
            text = str(processing.processor.tokenizer.decode(ids[start:end].tolist()))
            yield text, "learned" if kinds[start] == 1 else "given"
        start = end


def _check_labels(example: Example, image_token_id: int) -> None:
    """Assert what must never happen: no target at all, a target on an image, a target without a token before it."""
    targets = example.input_ids[example.is_target]
    assert len(targets), "an example without a target reached the model"
    assert not np.any(targets == image_token_id), "an image token is a target"
    assert not example.is_target[0], "the first token is a target"


def write_labels(path: Path, corpus: Corpus, usable: Int[np.ndarray, "usable"]) -> None:
    """One line per usable record: {"id", "input_ids", "labels"}; image tokens expanded, labels unshifted, -100: no target.

    With data.answers = "weighted" one line per answer, with its "weight".
    """
    write_json_lines(
        (
            {
                "id": corpus.record(row).id,
                "input_ids": example.input_ids.tolist(),
                "labels": np.where(example.is_target, example.input_ids, -100).tolist(),
                **({"weight": example.weight} if example.weight != 1 else {}),
            }
            for row in usable.tolist()
            for example in corpus.encode(row).examples
        ),
        path,
    )
