"""Texts of the data that hold what the tokenizer also has as a token, and what becomes of it there."""

import re
from collections import Counter

import numpy as np

from llava_accel.data.corpus import Corpus
from llava_accel.model.processing import Processing
from llava_accel.sources.problems import some


def tokens_in_texts(corpus: Corpus, rows: np.ndarray, processing: Processing) -> list[str]:
    """Lines for the console: how many of these records hold an added token, as a token and spelled out.

    The image token is left out: in the data it is the place of an image.
    """
    tokenizer = processing.processor.tokenizer
    added = {tokenizer.added_tokens_decoder[id].content: id for id in tokenizer.added_tokens_decoder}
    added = {token: id for token, id in added.items() if id != processing.image_token_id and token.strip()}
    if not added:
        return []
    counts = _count(corpus, rows, sorted(added, key=len, reverse=True))
    parsed = {token for token, id in added.items() if not tokenizer.added_tokens_decoder[id].special}
    return [
        f"{some([f'{token!r} in {count:,} records' for token, count in found])}: {what}"
        for what, found in (
            ("read as tokens of the base", [each for each in counts.most_common() if each[0] in parsed]),
            (
                "spelled out as text, as special tokens are. model.added_tokens names those that a text may hold",
                [each for each in counts.most_common() if each[0] not in parsed],
            ),
        )
        if found
    ]


def _count(corpus: Corpus, rows: np.ndarray, tokens: list[str]) -> Counter[str]:
    """In how many records each token stands."""
    expression = "|".join(map(re.escape, tokens))
    in_text, in_json = re.compile(expression), re.compile(expression.encode() + rb"|\\u")
    counts: Counter[str] = Counter()
    for row in rows.tolist():
        if in_json.search(corpus.raw(row)):
            record = corpus.record(row)
            texts = [turn.text for turn in record.turns] + [text for text, _ in record.answers]
            counts.update({token for text in texts for token in in_text.findall(text)})
    return counts
