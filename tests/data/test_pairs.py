"""Every form in which others write pairs of answers becomes one record, and what is no pair is refused with a remedy."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers.samples import corpus, record
from llava_accel.data.records import Record, parse_record
from llava_accel.data.row_forms import RowForm
from llava_accel.data.survey import survey
from llava_accel.sources.problems import DataError

PAIRS = RowForm(pairs=True)
ASKED = [{"role": "user", "content": "What is it?"}]
MARKED = [{"role": "user", "content": "<image>What is it?"}]


def said(text: str) -> list[dict[str, object]]:
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def parse(fields: Mapping[str, object], form: RowForm = PAIRS) -> Record:
    return parse_record(json.dumps(fields).encode(), 1, form)


FORMS = {
    "trl": {"prompt": ASKED, "chosen": said("a cat"), "rejected": said("a dog")},
    "trl, texts": {"prompt": "What is it?", "chosen": "a cat", "rejected": "a dog"},
    "trl, implicit prompt": {"chosen": [*ASKED, *said("a cat")], "rejected": [*ASKED, *said("a dog")]},
    "llama-factory": {
        "conversations": [{"from": "human", "value": "What is it?"}],
        "chosen": {"from": "gpt", "value": "a cat"},
        "rejected": {"from": "gpt", "value": "a dog"},
    },
    "llama-factory, alpaca": {"instruction": "What is it?", "input": "", "chosen": "a cat", "rejected": "a dog"},
    "ms-swift": {"messages": [*ASKED, {"role": "assistant", "content": "a cat"}], "rejected_response": "a dog"},
    "ms-swift, messages": {"messages": [*ASKED, *said("a cat")], "rejected_messages": [*ASKED, *said("a dog")]},
    "ms-swift, old": {"query": "What is it?", "response": "a cat", "rejected_response": "a dog"},
    "rlaif-v": {"question": "What is it?", "chosen": "a cat", "rejected": "a dog"},
    "ours": {"question": "What is it?", "answer": "a cat", "rejected": "a dog"},
}


@pytest.mark.parametrize("fields", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("image", [{}, {"image": "t0.png"}], ids=["text", "image"])
def test_every_form_is_one_pair(fields: Mapping[str, object], image: Mapping[str, object]) -> None:
    form = RowForm(missing_image_mark="start", pairs=True)
    found = parse({**fields, **image}, form)
    assert [turn.text.replace("<image>", "").strip() for turn in found.turns] == ["What is it?", "a cat"]
    assert found.rejected == "a dog" and found.is_pair
    assert found.images == tuple(image.values())
    plain = parse({**fields, **image}, RowForm(missing_image_mark="start"))
    assert plain.turns == found.turns and plain.is_pair and plain.rejected is None


def test_columns_of_the_user_name_both_answers() -> None:
    form = RowForm((("chosen", "better"), ("question", "q"), ("rejected", "worse")), pairs=True)
    found = parse({"q": "What?", "better": "a cat", "worse": "a dog"}, form)
    assert (found.turns[-1].text, found.rejected) == ("a cat", "a dog")


def test_of_several_rounds_the_last_answer_alone_differs() -> None:
    rounds = [*ASKED, *said("An animal."), {"role": "user", "content": "Which?"}]
    found = parse({"prompt": rounds, "chosen": said("a cat"), "rejected": said("a dog")})
    assert len(found.turns) == 4 and found.rejected == "a dog"


@pytest.mark.parametrize(
    ("fields", "problem", "remedy"),
    [
        ({"question": "Q", "chosen": "same", "rejected": "same "}, "are the same, 'same'", "Remove the record"),
        (
            {"chosen": [*ASKED, *said("a")], "rejected": [{"role": "user", "content": "Other?"}, *said("b")]},
            "do not end the same conversation",
            "the same turns before their last answer",
        ),
        (
            {
                "prompt": ASKED,
                "chosen": [*said("a"), {"role": "user", "content": "And?"}, *said("b")],
                "rejected": said("c"),
            },
            "do not end the same conversation",
            "the same turns",
        ),
        ({"prompt": ASKED, "chosen": said("a"), "rejected": MARKED}, "turn 2 is from 'user'", "Merge neighbouring"),
        (
            {"question": "Q", "chosen": "a", "rejected": True},
            "with the rejected answer .* is True",
            "Write it as a string",
        ),
        (
            {"image": "a.png", "question": "<image>Q", "chosen": "a", "rejected": "<image> b"},
            "outside a user turn",
            "into a question",
        ),
        (
            {
                "images": ["a.png"],
                "messages": [*MARKED, *said("a")],
                "rejected_response": "b",
                "rejected_images": ["b.png"],
            },
            "'rejected_images' names other images",
            "remove the record",
        ),
        ({"chosen": "a cat", "rejected": "a dog"}, "nothing says what it answers", "in 'prompt' or 'question'"),
    ],
    ids=[
        "equal",
        "other question",
        "other rounds",
        "no answer",
        "no text",
        "image",
        "other images",
        "no question",
    ],
)
def test_what_is_no_pair_is_refused(fields: Mapping[str, object], problem: str, remedy: str) -> None:
    with pytest.raises(DataError, match=problem) as error:
        parse(fields)
    assert remedy in error.value.remedy


@pytest.mark.parametrize("text", ["", " \n", "\u200b"])
def test_a_blank_rejected_answer_is_refused_as_a_blank_answer_is(text: str) -> None:
    with pytest.raises(DataError, match="rejected answer is blank") as error:
        parse({"question": "Q", "chosen": "a", "rejected": text}).check_answers()
    assert error.value.kind == "blank_answer"


def test_the_same_images_may_be_named_for_both_answers() -> None:
    row = {
        "images": ["a.png"],
        "messages": [*MARKED, *said("a")],
        "rejected_response": "b",
        "rejected_images": ["a.png"],
    }
    assert parse(row).rejected == "b"


def test_a_record_without_a_rejected_answer_is_refused_where_pairs_are_learned(tmp_path: Path) -> None:
    data = corpus(tmp_path, [record("Q", "A", id="one")], PAIRS, answers="pairs")
    with pytest.raises(
        DataError, match=r'row 1 \(id .one.\): there is no "rejected" answer.*train.objective = "answers"'
    ):
        data.encode(0)


def test_only_the_last_answers_are_targets_and_the_prompt_is_common(tmp_path: Path) -> None:
    rounds = [*ASKED, *said("An animal."), {"role": "user", "content": "Which?"}]
    row = {"prompt": rounds, "chosen": said("red cat"), "rejected": said("red dog of a kind")}
    data = corpus(tmp_path, [row], PAIRS, answers="pairs")
    chosen, rejected = data.encode(0).examples
    prompt = chosen.prompt_length()
    assert prompt == rejected.prompt_length() and not chosen.is_target[:prompt].any()
    assert chosen.is_target[prompt:].all() and rejected.is_target[prompt:].all()
    assert rejected.num_repeated >= prompt and chosen.end_id == rejected.end_id


def test_rejected_answers_that_are_not_learned_from_are_counted(tmp_path: Path) -> None:
    rows = [FORMS["rlaif-v"], record("Q", "A"), FORMS["ours"]]
    assert survey(corpus(tmp_path, rows), workers=0, decode=False).num_ignored == 2
    rows = [FORMS["rlaif-v"], FORMS["ours"]]
    pairs = corpus(tmp_path, rows, PAIRS, answers="pairs")
    assert survey(pairs, workers=0, decode=False).num_ignored == 0
