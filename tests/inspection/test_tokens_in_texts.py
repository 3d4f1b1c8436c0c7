"""`check` says which added tokens the texts hold, and what becomes of them."""

from collections import Counter
from pathlib import Path

from transformers import AddedToken

from helpers.samples import corpus, record
from llava_accel.data.survey import survey
from llava_accel.inspection.tokens_in_texts import tokens_in_texts, watched
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import ModelTable


def processing(llava_folder: Path, *special: str) -> Processing:
    found = load_processing(ModelTable(base=str(llava_folder)), "pad")
    found.processor.tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    found.processor.tokenizer.add_tokens([AddedToken("<word>", special=False)])
    return found


def test_tokens_are_counted_by_record_as_words_and_spelled_out(tmp_path: Path, llava_folder: Path) -> None:
    data = corpus(
        tmp_path,
        [
            record("where?", "<loc_1><loc_12><loc_12>"),
            record("is it \\u003c?", "<word> </s>"),
            record("what then?", "yes", answers=["<loc_1>"]),
            record("what?", "nothing <loc_3>"),
        ],
    )
    found = processing(llava_folder, "<loc_1>", "<loc_12>")
    mentions = survey(data, workers=0, decode=False, watched=watched(found)).mentions
    lines = tokens_in_texts(mentions, found)
    assert lines == [
        "'<word>' in 1 records: read as tokens of the base",
        "'<loc_1>' in 2 records, '<loc_12>' in 1 records, '</s>' in 1 records: spelled out as text, as special tokens "
        "are. model.added_tokens names those that a text may hold",
    ]
    assert tokens_in_texts(Counter(), found) == []
