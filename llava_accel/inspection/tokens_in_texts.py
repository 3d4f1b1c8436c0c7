"""Finds added tokens of the tokenizer in the texts of the data, and says how they are read there."""

from collections import Counter

from llava_accel.model.processing import Processing
from llava_accel.sources.problems import some


def watched(processing: Processing) -> list[str]:
    """The added tokens to look for in texts. The image token is left out: in the data it is the place of an image."""
    added = processing.processor.tokenizer.added_tokens_decoder
    return [added[id].content for id in added if id != processing.image_token_id and added[id].content.strip()]


def tokens_in_texts(mentions: Counter[str], processing: Processing) -> list[str]:
    """Lines for the console on the tokens that were found in texts: how they are read there.

    Args:
        mentions: How many records hold each of the `watched` tokens.
    """
    added = processing.processor.tokenizer.added_tokens_decoder.values()
    parsed = {token.content for token in added if not token.special}
    ordered = mentions.most_common()
    return [
        f"{some([f'{token!r} in {count:,} records' for token, count in counted])}: {what}"
        for what, counted in (
            ("read as tokens of the base", [each for each in ordered if each[0] in parsed]),
            (
                "spelled out as text, as special tokens are. model.added_tokens names those that a text may hold",
                [each for each in ordered if each[0] not in parsed],
            ),
        )
        if counted
    ]
