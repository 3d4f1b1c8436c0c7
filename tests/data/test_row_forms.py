"""Every form in which data sets write a record becomes the record that it is in LLaVA's form."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from helpers.samples import PARITY, corpus, corpus_of, encoder, image_in, llama, record
from llava_accel.data.conversation import Turn
from llava_accel.data.records import Record, parse_record, record_id
from llava_accel.data.row_forms import RowForm
from llava_accel.recipe.inputs import ColumnName
from llava_accel.recipe.toml import toml_value
from llava_accel.sources.extraction import Extraction
from llava_accel.sources.problems import DataError

ONE, TWO = "<image>\nwhat?", ("<image>\nwhat?", "red", "why?", "so it is")
A_USER, AN_ANSWER = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}
A_QUESTION = {"question": "what?", "answer": "red"}
HISTORY = [["what?", "red"]]
OPTIONS = "\nA. blue\nB. red\nAnswer with the option's letter from the given choices directly."
CHOICE = record(f"<image>\nwhat?{OPTIONS}", "B", image="t0.png", choices=["blue", "red"])
TEXT, IMAGE = {"type": "text", "text": "what?"}, {"type": "image"}


def parts(*content: object, **fields: object) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": list(content)},
            {**AN_ANSWER, "content": [{"type": "text", "text": "red"}]},
        ]
    } | fields


def said(*speakers: str) -> list[dict[str, str]]:
    return [{"from": one, "value": text} for one, text in zip(speakers, (ONE, "red"), strict=True)]


ROUND = record(ONE, "red", image="t0.png")
ROUNDS = record(*TWO, image="t0.png")
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> a row, the same in LLaVA's form
    "messages": ({"messages": [A_USER | {"content": ONE}, AN_ANSWER], "image": "t0.png"}, ROUND),
    "messages as the text of a cell": (
        {"messages": json.dumps([A_USER | {"content": ONE}, AN_ANSWER]), "image": "t0.png"},
        ROUND,
    ),
    "a conversation as the text of a cell": ({"conversations": json.dumps(said("human", "gpt")), "image": "t0.png"}, ROUND),
    "conversation": ({"conversation": said("human", "gpt"), "image": "t0.png"}, ROUND),
    "speakers in capitals": ({"conversations": said("Human", "GPT"), "image": "t0.png"}, ROUND),
    "speakers as elsewhere": ({"conversations": said("USER", "bot"), "image": "t0.png"}, ROUND),
    "a model speaks": ({"conversations": said("user", "model"), "image": "t0.png"}, ROUND),
    "a chatbot speaks": ({"conversations": said("user", "Chatbot"), "image": "t0.png"}, ROUND),
    "an AI speaks": ({"conversations": said("human", "AI"), "image": "t0.png"}, ROUND),
    "rounds of texts": (
        {"texts": [{"user": "what?", "assistant": "red"}, {"user": "why?", "assistant": "so it is"}], "images": ["t0.png"]},
        ROUNDS,
    ),
    "parts": (parts(IMAGE, TEXT, images=["t0.png"]), ROUND),
    "a part names its image": (parts(IMAGE | {"image": "t0.png"}, TEXT), ROUND),
    "a part names its image's path": (parts(IMAGE | {"image": {"path": "t0.png", "bytes": None}}, TEXT), ROUND),
    "a part has base64": (parts(IMAGE | {"base64": "t0.png"}, TEXT), ROUND),
    "a part has an address": (parts({"type": "image_url", "image_url": {"url": "t0.png"}}, TEXT), ROUND),
    "parts as Parquet has them": (
        parts(IMAGE | {"text": None, "index": 0}, TEXT | {"index": None}, images=["t0.png"]), ROUND
    ),
    "parts name images by their places": (
        parts(IMAGE | {"index": 1}, IMAGE | {"index": 0}, TEXT, images=["t1.png", "t0.png"]),
        record("<image>\n<image>\nwhat?", "red", image=["t0.png", "t1.png"]),
    ),
    "an image between parts": (
        parts({"type": "text", "text": "look: "}, IMAGE, {"type": "text", "text": " what?"}, images=["t0.png"]),
        record("look: <image> what?", "red", image="t0.png"),
    ),
    "prompt and completion": ({"prompt": "what?", "completion": "red", "image": "t0.png"}, ROUND),
    "prompt and completion as messages": (
        {"prompt": [A_USER | {"content": ONE}], "completion": [AN_ANSWER], "image": "t0.png"}, ROUND
    ),
    "prompt and completion in parts": (
        {"prompt": [A_USER | {"content": [IMAGE, TEXT]}], "completion": [AN_ANSWER], "images": ["t0.png"]}, ROUND
    ),
    "a preferred answer": ({"prompt": "what?", "chosen": "red", "rejected": "blue", "images": ["t0.png"]}, ROUND),
    "a preferred answer as messages": (
        {"prompt": [A_USER | {"content": ONE}], "chosen": [AN_ANSWER], "rejected": [], "images": ["t0.png"]}, ROUND
    ),
    "a preferred conversation": ({"prompt": "what?", "chosen": [A_USER, AN_ANSWER], "images": ["t0.png"]}, ROUND),
    "a preferred turn": (
        {"conversations": said("human", "gpt")[:1], "chosen": said("human", "gpt")[1], "images": ["t0.png"]}, ROUND
    ),
    "an answer that is there is learned, not the preferred one": (ROUND | {"chosen": "blue"}, ROUND),
    "prompt and response": ({"prompt": "what?", "response": "red", "image": "t0.png"}, ROUND),
    "query and response": ({"query": "what?", "response": "red", "images": ["t0.png"]}, ROUND),
    "a query with its mark": ({"query": "<image>what?", "response": "red", "images": ["t0.png"]}, ROUND),
    "a query after others": (
        {"query": "why?", "response": "so it is", "history": HISTORY, "images": ["t0.png"]}, ROUNDS
    ),
    "answers after others": (
        {"question": "why?", "answers": ["so it is"], "history": HISTORY, "image": "t0.png"},
        ROUNDS | {"answers": {"so it is": 1}},
    ),
    "choices after others": (
        {"question": "why?", "choices": ["blue", "red"], "answer": 1, "history": HISTORY, "image": "t0.png"},
        record(ONE, "red", f"why?{OPTIONS}", "B", image="t0.png", choices=["blue", "red"]),
    ),
    "instruction and output": ({"instruction": "what?", "input": "", "output": "red", "image": "t0.png"}, ROUND),
    "an instruction with an input": (
        {"instruction": "Translate.", "input": "rouge", "output": "red"}, record("Translate.\nrouge", "red")
    ),
    "question and answer": ({"question": "what?", "answer": "red", "image": "t0.png"}, ROUND),
    "a question and answers": (
        {"question": "what?", "answers": ["blue", "red", "red"], "image": "t0.png"},
        ROUND | {"answers": {"blue": 1, "red": 2}},
    ),
    "a question and annotators": (
        {"question": "what?", "answers": [{"answer": "red"}, {"answer": "blue"}], "image": "t0.png"},
        ROUND | {"answers": {"red": 1, "blue": 1}},
    ),
    "a question and a list in answer": (
        {"question": "what?", "answer": ["red", "red", " "], "image": "t0.png"}, ROUND | {"answers": {"red": 2, " ": 1}}
    ),
    "choices and a number": ({"question": "what?", "choices": ["blue", "red"], "answer": 1, "image": "t0.png"}, CHOICE),
    "choices and a letter": ({"question": "what?", "options": ["blue", "red"], "answer": "B", "image": "t0.png"}, CHOICE),
    "choices and a text": ({"question": "what?", "choices": ["blue", "red"], "answer": "red", "image": "t0.png"}, CHOICE),
    "choices and an option": ({"question": "what?", "choices": ["blue", "red"], "answer": "(B)", "image": "t0.png"}, CHOICE),
    "choices by their letters": (
        {"question": "what?", "options": {"A": "blue", "B": "red"}, "answer": "B", "image": "t0.png"}, CHOICE
    ),
    "no choices": ({"question": "what?", "options": [], "answer": "red", "image": "t0.png"}, ROUND),
    "a caption": ({"image": "t0.png", "caption": "a red shape"}, record("<image>", "a red shape", image="t0.png")),
    "a caption called text": ({"image": {"path": "t0.png"}, "text": "red"}, record("<image>", "red", image="t0.png")),
    "captions": (
        {"image": "t0.png", "caption": ["red", "rot", "red"]},
        record("<image>", "red", image="t0.png", answers={"red": 2, "rot": 1}),
    ),
    "prefix and suffix": ({"image": "t0.png", "prefix": "what?", "suffix": "red"}, ROUND),
    "a number is the answer": (
        {"image": "t0.png", "question": "how many?", "answer": 3}, record("<image>\nhow many?", "3", image="t0.png")
    ),
    "a system text": (
        {"system": "Be short.", "messages": [A_USER, AN_ANSWER]},
        {"conversations": [{"from": "system", "value": "Be short."}, A_USER, AN_ANSWER]},
    ),
    "a system prompt beside a question": (
        {"system_prompt": "Be short.", "question": "what?", "answer": "red", "image": "t0.png"},
        {"conversations": [{"from": "system", "value": "Be short."}, *said("human", "gpt")], "image": "t0.png"},
    ),
    "a blank system text": (
        {"system": "", "query": "what?", "response": "red"},
        {"conversations": [{"from": "system", "value": ""}, A_USER, AN_ANSWER]},
    ),
    "the same system text twice": (
        {"system": "S", "conversations": [{"from": "system", "value": "S"}, *said("human", "gpt")], "image": "t0.png"},
        {"conversations": [{"from": "system", "value": "S"}, *said("human", "gpt")], "image": "t0.png"},
    ),
    "an image path": (record(ONE, "red", image_path="t0.png"), ROUND),
    "an image's address": ({"image_url": "t0.png", "question": "what?", "answer": "red"}, ROUND),
    "an img": (record(ONE, "red", img="t0.png"), ROUND),
    "images with paths": (record(ONE, "red", images=[{"path": "t0.png", "bytes": None}]), ROUND),
    "an image with an address": (record(ONE, "red", image={"url": "t0.png"}), ROUND),
    "a leading answer": (
        {"conversations": [{"from": "gpt", "value": "hello"}, *said("human", "gpt")], "image": "t0.png"}, ROUND
    ),
    "a trailing question": (
        {"conversations": [*said("human", "gpt"), {"from": "human", "value": "thanks"}], "image": "t0.png"}, ROUND
    ),
    "images of turns that are dropped": (
        {
            "conversations": [
                {"from": "gpt", "value": "<image>"}, *said("human", "gpt"), {"from": "human", "value": "<image> and this?"}
            ],
            "image": ["t1.png", "t0.png", "t1.png"],
        },
        ROUND,
    ),
    "nulls": (
        ROUND | dict.fromkeys(("messages", "texts", "prompt", "chosen", "system", "images", "caption", "answers")), ROUND
    ),
    "other forms beside it": (ROUND | {"question": "how?", "answer": "so", "caption": "a shape", "prompt": "x"}, ROUND),
}  # fmt: skip


def parse(fields: object, *columns: tuple[str, str], mark: Literal["error", "start"] = "error") -> Record:
    return parse_record(json.dumps(fields).encode(), 7, RowForm(columns, mark))


PARTS = {name for name in FORMS if "part" in name or "mark" in name} - {"an image between parts"}
"""Where the mark is no line of its own, as it is in LLaVA's form."""


@pytest.mark.parametrize(
    ("name", "placement"),
    [(name, "start") for name in FORMS] + [(name, "in_place") for name in FORMS if name not in PARTS],
)
def test_a_row_is_learned_as_the_same_row_in_llavas_form(name: str, placement: str) -> None:
    row, same = FORMS[name]
    encode = encoder(llama(), image_placement=placement)
    one, other = (encode(parse(fields), 0, image_in(PARITY / "images")) for fields in (row, same))
    assert one.example.input_ids.tolist() == other.example.input_ids.tolist()
    assert one.example.is_target.tolist() == other.example.is_target.tolist() and one.example.num_targets > 0
    assert one.example.images == other.example.images
    assert (one.record.answers, one.record.choices) == (other.record.answers, other.record.choices)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [("a leading answer", 1), ("a trailing question", 1), ("images of turns that are dropped", 2), ("messages", 0)],
)
def test_turns_without_a_partner_are_counted(name: str, dropped: int) -> None:
    assert parse(FORMS[name][0]).dropped_turns == dropped


def test_images_of_parts_that_others_do_not_name_are_not_guessed() -> None:
    for row, says in (
        (parts(IMAGE | {"image": "t0.png"}, IMAGE), "names no image"),
        (parts(IMAGE | {"index": 1}, TEXT, images=["t0.png"]), "names image 1"),
        (parts(IMAGE | {"image": "t0.png"}, TEXT, images=["t1.png"]), "'t1.png', which no image part names"),
        (parts(IMAGE, TEXT), "names 0 image"),
    ):
        with pytest.raises(DataError, match=says) as caught:
            parse(row)
        assert caught.value.kind == "image_count"


@pytest.mark.parametrize("turns", [[A_USER, AN_ANSWER], [{"role": "system", "content": "S"}, A_USER, AN_ANSWER]])
def test_missing_marks_are_refused_or_put_at_the_start(turns: Sequence[object]) -> None:
    row = {"messages": list(turns), "images": ["a.png", "b.png"]}
    with pytest.raises(DataError, match=r'data\.missing_image_mark = "start"'):
        parse(row)
    assert parse(row, mark="start").turns[-2:] == (Turn("user", "<image>\n<image>\nwhat?"), Turn("assistant", "red"))


def test_marks_that_are_there_are_not_added_to() -> None:
    assert parse(FORMS["an image between parts"][0], mark="start").turns[0].text == "look: <image> what?"
    with pytest.raises(DataError, match="1 <image>, but the record names 2"):
        parse(record(ONE, "red", images=["a.png", "b.png"]), mark="start")


def test_a_caption_of_several_images_is_of_all_of_them() -> None:
    assert parse({"images": ["a.png", "b.png"], "caption": "two"}).turns[0] == Turn("user", "<image>\n<image>")


COLUMNS = (("answer", "label"), ("image", "photo.file"), ("question", "q"))
MAPPED = {"q": "what?", "label": "red", "photo": {"file": "t0.png"}}


def test_columns_are_read_under_the_users_names() -> None:
    assert parse(MAPPED, *COLUMNS).turns == parse(ROUND).turns
    assert parse(MAPPED, *COLUMNS).images == ("t0.png",)
    assert parse(MAPPED | {"nr": "x"}, *COLUMNS, ("id", "nr")).id == "x"
    assert record_id(json.dumps(MAPPED | {"nr": "x"}).encode(), RowForm((("id", "nr"),))) == "x"


def test_named_columns_come_before_forms_that_nobody_named() -> None:
    row = MAPPED | record("other", "one")
    assert parse(row, *COLUMNS).turns == parse(ROUND).turns
    assert (
        parse(row, ("image", "photo.file"), mark="start").turns
        == parse(record("<image>\nother", "one", image="x")).turns
    )


def test_a_dot_in_a_name_is_a_name_first() -> None:
    assert parse({"a.b": "what?", "a": {"b": "no"}, "answer": "red"}, ("question", "a.b")).turns[0].text == "what?"


def test_a_row_of_no_form_names_its_columns_and_proposes_theirs() -> None:
    with pytest.raises(DataError) as caught:
        parse({"photo": "t0.png", "user_query": "what?", "label": "red", "n": None})
    message = str(caught.value)
    assert "in no other form: it has 'photo', 'user_query', 'label'." in message
    assert "question + answer|answers" in message and "instruction + output" in message
    proposed = '{image = "photo", question = "user_query", answer = "label"}'
    assert f"data.columns = {proposed}" in message
    row = {"photo": "t0.png", "user_query": "what?", "label": "red"}
    assert parse(row, ("image", "photo"), ("question", "user_query"), ("answer", "label")).turns == parse(ROUND).turns


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"image": "t0.png", "q": "what?", "label": "red"}, (("question", "q"), ("answer", "label"))),
        ({"image": "t0.png", "question": "what?", "reply": "red"}, (("answer", "reply"),)),
        ({"file_name": "t0.png", "label": "red"}, (("image", "file_name"), ("caption", "label"))),
        ({"image": "t0.png", "query": "what?", "label": ["red", "rot"]}, (("question", "query"), ("answer", "label"))),
        ({"image": "t0.png", "captions": ["red", "rot"]}, (("caption", "captions"),)),
        ({"URL": "t0.png", "TEXT": "red"}, (("image", "URL"), ("caption", "TEXT"))),
    ],
)
def test_what_is_proposed_works(row: dict[str, Any], columns: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(DataError, match=re.escape(f"data.columns = {toml_value(dict(columns))}")):
        parse(row)
    assert parse(row, *columns).images == ("t0.png",) and parse(row, *columns).turns[1] == Turn("assistant", "red")


def test_the_column_that_holds_an_image_is_proposed_whatever_its_name(tmp_path: Path) -> None:
    content = {"bytes": (PARITY / "images" / "t0.png").read_bytes(), "path": None}
    for name in ("pixel", "answer_sheet"):
        with pytest.raises(DataError, match=re.escape(f'data.columns = {{image = "{name}", caption = "label"}}')):
            embedded(tmp_path, {name: content, "label": "cat"})


def test_columns_may_be_any_field_of_a_form() -> None:
    row, columns = {"a": HISTORY, "b": "why?", "c": "so it is"}, (("history", "a"), ("query", "b"), ("response", "c"))
    assert {ours for ours, _ in columns} <= set(get_args(ColumnName))
    assert parse(row, *columns).turns == parse(record("what?", "red", "why?", "so it is")).turns


def test_a_column_that_no_row_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    rows = [record("Q", "A", photo=None), record(ONE, "red", photo="t0.png", id="x")]
    with pytest.raises(DataError, match=r"data\.columns\.image is 'foto'.*Did you mean 'photo'"):
        corpus(tmp_path, rows, form=RowForm((("image", "foto"),)))
    assert corpus(tmp_path, rows, form=RowForm((("image", "photo"),))).record(1).images == ("t0.png",)
    # One row that has it is enough: text alone needs no image.
    corpus(tmp_path, [record("Q", "A"), "{", record(ONE, "red", photo="t0.png")], form=RowForm((("image", "photo"),)))


def test_a_corpus_that_is_read_otherwise_is_another_one(tmp_path: Path) -> None:
    rows = [MAPPED | {"q2": "why?"}]
    one = corpus(tmp_path, rows, form=RowForm(COLUMNS))
    others = [
        corpus_of(tmp_path / "data.jsonl", form=form)
        for form in (RowForm((*COLUMNS[:2], ("question", "q2"))), RowForm(COLUMNS, "start"), RowForm())
    ]
    assert len({each.fingerprint() for each in (one, *others)}) == 4


def embedded(folder: Path, row: dict[str, Any]) -> Record:
    """The record of a row that holds the bytes of images."""
    with Extraction(folder / "a.jsonl", folder / "images") as extraction:
        raw = extraction.row(row)
    return parse_record(raw, 1, files=["", str(folder / "images")])


UNREAD = {  # what is not learned -> the row, and what the message says
    "an image under another name": ({"photo": "a.png"}, 'data.columns = {image = "photo"}'),
    "images under another name": ({"photos": ["a.png", "b.png"]}, 'data.columns = {image = "photos"}'),
    "an image that is nested": ({"photo": {"path": "a.JPG", "bytes": None}}, "'photo' is"),
    "an address": ({"picture_link": "https://nowhere.invalid/1"}, 'data.columns = {image = "picture_link"}'),
    "the bytes of an image": (
        {"photo": {"bytes": (PARITY / "images" / "t0.png").read_bytes(), "path": "t0.png"}},
        "t0.png",
    ),
    "the number of an image": ({"image_id": 7}, "Write its file in 'image'"),
    "a file beside a number": ({"img_id": 7, "img_name": "a.png"}, 'data.columns = {image = "img_name"}'),
    "a video": ({"video": "a.mp4"}, "only images are learned"),
    "videos": ({"videos": ["a.mp4"], "image": "a.png"}, "only images are learned"),
    "a sound": ({"audios": ["a.mp3"]}, "only images are learned"),
}


@pytest.mark.parametrize("unread", UNREAD)
def test_what_a_record_shows_is_never_passed_over(tmp_path: Path, unread: str) -> None:
    fields, says = UNREAD[unread]
    for row in (A_QUESTION, {"messages": [A_USER, AN_ANSWER]}, record("what?", "red"), record(ONE, "red")):
        with pytest.raises(DataError, match=re.escape(says)):
            embedded(tmp_path, row | fields)


@pytest.mark.parametrize("content", [b"caf\xe9", (PARITY / "images" / "t0.png").read_bytes()])
@pytest.mark.parametrize("name", ["answer", "question", "answers", "rejected"])
def test_bytes_that_are_no_text_are_not_learned_as_their_place(tmp_path: Path, name: str, content: bytes) -> None:
    row = {"question": "what?", "answer": "red", name: ["red", content] if name == "answers" else content}
    with Extraction(tmp_path / "a.jsonl", tmp_path / "images") as extraction:
        raw = extraction.row(row)
    with pytest.raises(DataError, match="a question or an answer is an image, or bytes that are not UTF-8"):
        parse_record(raw, 1, RowForm((("image", "photo"),), pairs=name == "rejected"), ["", str(tmp_path / "images")])


def test_images_beside_the_image_that_is_read_are_not_passed_over() -> None:
    row = A_QUESTION | {"image": "a.png", "images": ["a.png", "b.png"]}
    with pytest.raises(DataError, match="'images' has 2, and 'image' 1, which alone is read"):
        parse(row)
    assert parse(row | {"images": ["folder/a.png"]}).images == ("a.png",)
    assert parse(row | {"image": None}).images == ("a.png", "b.png")


def test_several_images_under_other_names_are_all_named() -> None:
    row = A_QUESTION | {"image": None, "left": "a.png", "right": "b.png"}
    says = r"'left' is 'a.png', .*and so does 'right'.*image = \"left\".*; or write all of them in 'images'"
    with pytest.raises(DataError, match=says):
        parse(row)
    assert parse(row, ("image", "left")).images == ("a.png",)
    assert parse(row | {"images": ["a.png", "b.png"]}).images == ("a.png", "b.png")
    assert parse(A_QUESTION | {"image": "a.png", "image_256": "small.png"}).images == ("a.png",)


def test_marks_of_other_models_are_not_left_in_texts() -> None:
    with pytest.raises(DataError, match=r"Write <image> in place of <\|image\|>"):
        parse(record("<|image|>what?", "red", image="a.png"), mark="start")
    assert parse(record("a <image 1> tag?", "red")).images == ()
    assert parse(record("<image>\nan <image 1> tag?", "red", image="a.png")).turns[0].text.endswith("tag?")


def test_a_null_in_a_named_column_is_told_by_the_users_name() -> None:
    with pytest.raises(DataError, match="'label' is null"):
        parse(MAPPED | {"label": None}, *COLUMNS)


def test_boxes_and_paths_in_texts_are_refused() -> None:
    grounded = {"messages": [A_USER | {"content": "<image>find <ref-object>"}, AN_ANSWER | {"content": "<bbox>"}]}
    for row, says in (
        (
            grounded | {"images": ["a.png"], "objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}},
            "<bbox> and <ref-object>",
        ),
        (record("Picture 1: <img>a.png</img>\nwhat?", "red"), "Write <image>, and its name in 'image'"),
    ):
        with pytest.raises(DataError, match=re.escape(says)):
            parse(row)


@pytest.mark.parametrize(
    "row",
    [
        A_QUESTION | {"image": None, "answer": "logo.png"},
        A_QUESTION | {"id": "7.png", "source": "https://nowhere.invalid/1", "videos": [], "image_id": None},
        record("<image> Is <img>x</img> HTML?", "Yes.", objects={"bbox": []}, image="a.png"),
        {"messages": [A_USER, AN_ANSWER | {"content": "<img>a.png</img>"}], "images": []},
    ],
)
def test_texts_that_are_like_images_are_texts(row: dict[str, object]) -> None:
    assert parse(row).turns


def test_a_mapped_column_that_is_empty_is_no_image() -> None:
    assert parse(A_QUESTION | {"photo": None, "thumbnail": "a.png"}, ("image", "photo")).images == ()


def test_the_text_of_a_cell_says_where_images_are_as_a_list_does() -> None:
    row = {"conversations": json.dumps([A_USER, AN_ANSWER]), "image": "t0.png"}
    with pytest.raises(DataError, match="the text has 0 <image>"):
        parse_record(json.dumps(row).encode(), 1)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}])
def test_an_answer_that_is_not_to_be_learned_is_refused_and_one_that_is_is_not(mark: dict[str, float]) -> None:
    of_llava = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"} | mark]
    for messages in ([A_USER, AN_ANSWER | mark], [A_USER, AN_ANSWER, A_USER, AN_ANSWER | mark], of_llava):
        with pytest.raises(DataError, match=f"turn {len(messages)} has '{next(iter(mark))}'"):
            parse_record(json.dumps({"messages": messages}).encode(), 1)
    wanted = {key: 1 for key in mark} | dict.fromkeys(("loss", "train"))
    assert (
        parse_record(json.dumps({"messages": [A_USER | mark, AN_ANSWER | wanted]}).encode(), 1).turns[1].text == "red"
    )
