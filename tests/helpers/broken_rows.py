"""Records and data files that cannot be used, each with the kind that it is counted under and a word of its error."""

import json
from collections.abc import Callable

from helpers.samples import record

HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
TEXT_ONLY = record("Q", "A")
MALFORMED: dict[str, tuple[object, str, str]] = {  # name -> row, kind, a word of the message
    "a number": (5, "json", "not a JSON object"),
    "a list": ([1], "json", "not a JSON object"),
    "null": (None, "json", "not a JSON object"),
    "nothing": ({}, "fields", "'conversations' is missing"),
    "turns are null": ({"conversations": None}, "fields", "missing"),
    "turns are a string": ({"conversations": "Q"}, "fields", "'conversations' is 'Q'"),
    "turns are an object": ({"conversations": HUMAN}, "fields", "'conversations' is"),
    "no turns": ({"conversations": []}, "empty", "no turns"),
    "only a system turn": ({"conversations": [{"from": "system", "value": "S"}]}, "empty", "no turns"),
    "a turn is a string": ({"conversations": ["Q", GPT]}, "fields", "turn 1 is 'Q'"),
    "a turn is null": ({"conversations": [HUMAN, None]}, "fields", "turn 2 is 'None'"),
    "an unknown role": ({"conversations": [HUMAN, {"from": "narrator", "value": "A"}]}, "roles", "from 'narrator'"),
    "a call of a tool": ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}, GPT]}, "roles", "tool calls"),
    "no role": ({"conversations": [{"value": "Q"}, GPT]}, "roles", "turn 1 has no 'from' or 'role'"),
    "a role is a number": ({"conversations": [{"from": 1, "value": "Q"}, GPT]}, "roles", "from '1'"),
    "a role is a list": ({"conversations": [{"from": ["human"], "value": "Q"}, GPT]}, "roles", "turn 1"),
    "a text is missing": ({"conversations": [HUMAN, {"from": "gpt"}]}, "fields", "text of turn 2 is 'None'"),
    "a text is null": ({"conversations": [HUMAN, {"from": "gpt", "value": None}]}, "fields", "turn 2 is 'None'"),
    "a text is a number": ({"conversations": [HUMAN, {"from": "gpt", "value": 3}]}, "fields", "turn 2 is '3'"),
    "a text is a list": ({"conversations": [HUMAN, {"from": "gpt", "value": ["A"]}]}, "fields", "turn 2"),
    "two human turns": ({"conversations": [HUMAN, HUMAN, GPT]}, "roles", "turn 2 is from 'user'"),
    "two answers": ({"conversations": [HUMAN, GPT, GPT]}, "roles", "turn 3 is from 'assistant'"),
    "two leading answers": ({"conversations": [GPT, GPT, HUMAN, GPT]}, "roles", "turn 1 is from 'assistant'"),
    "two trailing questions": ({"conversations": [HUMAN, GPT, HUMAN, HUMAN]}, "roles", "turn 4 is from 'user'"),
    "only a question": ({"conversations": [HUMAN]}, "roles", "ends with a question"),
    "only an answer": ({"conversations": [GPT]}, "roles", "turn 1 is from 'assistant'"),
    "a late system turn": ({"conversations": [HUMAN, {"from": "system", "value": "S"}, GPT]}, "roles", "system"),
    "an image without a mark": (record("Q", "A", image="a.png"), "image_count", "data.missing_image_mark"),
    "an unknown form": ({"q": "Q", "label": "A"}, "fields", 'data.columns = {question = "q", answer = "label"}'),
    "a question without its answer": ({"question": "Q", "answer": None}, "fields", "'answer' is null. Fill it in"),
    "an image without its caption": ({"image": "a.png", "caption": None, "url": 3}, "fields", "'caption' is null"),
    "a caption without its image": ({"image": None, "caption": "A"}, "fields", "'image' is null"),
    "an answer is a fraction": ({"question": "Q", "answer": 3.5}, "fields", "3.5, not a text. Write it as a string"),
    "an answer is true": ({"question": "Q", "answer": True}, "fields", "True, not a text. Write it as a string"),
    "a question that LLaVA evaluates": (
        {"question_id": 1, "image": "a.png", "text": "Q\nAnswer with a word.", "category": "default"},
        "fields", "is a question, as in LLaVA's files of questions"
    ),
    "a second image in a field of its own": (
        {"image": "a.png", "image_2": "b.png", "question": "Q", "answer": "A"}, "image_count", "'image_2' seems to be"
    ),
    "a mark of Llama's": (record("<|image|>Q", "A", image="a.png"), "image_count", "Write <image> in place of <|image|>"),
    "a mark of Phi's": (record("<|image_1|>\nQ", "A", image="a.png"), "image_count", "in place of <|image_1|>"),
    "a mark of Qwen's": (
        record("<|vision_start|><|image_pad|><|vision_end|>Q", "A", image="a.png"), "image_count", "of <|vision_start|>"
    ),
    "a mark in capitals": (record("<Image>Q", "A", image="a.png"), "image_count", "in place of <Image>"),
    "a mark of MMMU's beside a question": (
        {"question": "<image 1> What?", "answer": "A", "image": "a.png"}, "image_count", "in place of <image 1>"
    ),
    "a question is a list": ({"question": ["Q"], "answer": "A"}, "fields", "'question' is"),
    "a caption is an object": ({"image": "a.png", "caption": {"A": [1]}}, "fields", "'caption' is"),
    "a history is no list of pairs": ({"query": "Q", "response": "A", "history": [["Q"]]}, "fields", "'history' is"),
    "rounds are a string": ({"texts": "Q"}, "fields", "'texts' is 'Q'"),
    "two system texts": (
        {"system": "S", "conversations": [{"from": "system", "value": "T"}, HUMAN, GPT]}, "roles", "'system'"
    ),
    "a system text is a list": (TEXT_ONLY | {"system": [3]}, "fields", "'system' is [3]"),
    "a part of another type": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, GPT]}, "fields", "turn 1 has the part"
    ),
    "an image part in an answer": (
        {"messages": [HUMAN, {"role": "assistant", "content": [{"type": "image"}]}]}, "image_count", "has an image"
    ),
    "a choice that is not there": ({"question": "Q", "choices": ["a", "b"], "answer": 2}, "fields", "one of the 2 choices"),
    "a letter that is another choice": (
        {"question": "Q", "choices": ["B", "A"], "answer": "A"}, "fields", "one of the 2 choices"
    ),
    "choices are no strings": ({"question": "Q", "choices": [1, 2], "answer": 1}, "fields", "the choices are"),
    "answers in lists under one name": ({"question": "Q", "answer": {"text": ["A"]}}, "fields", "'answer' is "),
    "captions are numbers": ({"image": "a.png", "caption": [1, 2]}, "fields", "'caption' is "),
    "a number is the question": ({"question": 7, "answer": "A"}, "fields", "'question' is '7'. Write it as a string"),
    "lists of questions and of answers": (
        {"questions": ["Q", "P"], "answers": ["A", "B"]}, "fields", "make them with a function of yours (data.reader)"
    ),
    "a choice by its number in quotes": (
        {"question": "Q", "choices": ["a", "b"], "answer": "0"}, "fields", "number from 0, without quotes"
    ),
    "a single choice": ({"question": "Q", "options": ["a"], "answer": 0}, "fields", "Write a list of 2 to 26 strings"),
    "more choices than letters": (
        {"question": "Q", "choices": list(map(str, range(100, 130))), "answer": 29}, "fields", "list of 2 to 26 strings"
    ),
    "a record in a caption": (
        {"image": "a.png", "text": '{"question": "Q", "chosen": "A", "rejected": "B"}'}, "fields", "a record and not a text"
    ),
    "a mark without an image": (record("<image>\nQ", "A"), "image_count", "names 0 image"),
    "two marks, one image": (record("<image><image>", "A", image="a.png"), "image_count", "2 <image>"),
    "one mark, two images": (record("<image>", "A", image=["a", "b"]), "image_count", "names 2"),
    "a mark in an answer": (record("<image>", "see <image>", image="a"), "image_count", "outside a user turn"),
    "an image is a number": (record("Q", "A", image=3), "fields", "'image' holds '3'"),
    "an image is an object": (record("<image>", "A", image=[{"bytes": "x"}]), "fields", "'image' holds"),
    "an image is null": (record("<image>", "A", image=["a", None]), "fields", "'image' holds 'None'"),
    "an image is empty": (record("<image>", "A", images=""), "fields", "'image' holds ''"),
    "an id is a list": (TEXT_ONLY | {"id": ["x"]}, "fields", "'id'"),
    "an id is true": (TEXT_ONLY | {"id": True}, "fields", "'id'"),
    "an id is a fraction": (TEXT_ONLY | {"id": 1.5}, "fields", "'id'"),
    "a question is a number": (TEXT_ONLY | {"question": 3}, "fields", "'question' is '3'"),
    "a type is a list": (TEXT_ONLY | {"answer_type": []}, "fields", "'answer_type'"),
    "answers are empty": (TEXT_ONLY | {"answers": []}, "fields", "'answers'"),
    "answers are a number": (TEXT_ONLY | {"answers": 3}, "fields", "'answers'"),
    "answers are nulls": (TEXT_ONLY | {"answers": {"red": None}}, "fields", "'answers'"),
    "a count is a string": (TEXT_ONLY | {"answers": {"red": "3"}}, "fields", "'answers'"),
    "a count is a list": (TEXT_ONLY | {"answers": {"red": [3]}}, "fields", "'answers'"),
    "a count is zero": (TEXT_ONLY | {"answers": {"red": 0}}, "fields", "'answers'"),
    "a count is true": (TEXT_ONLY | {"answers": {"red": True}}, "fields", "'answers'"),
    "a count has no end": (TEXT_ONLY | {"answers": {"red": float("inf")}}, "fields", "'answers'"),
    "a count is no number": (TEXT_ONLY | {"answers": {"red": float("nan")}}, "fields", "'answers'"),
    "an answer is a number": (TEXT_ONLY | {"answers": ["red", 3]}, "fields", "'answers'"),
    "an answer has no text": (TEXT_ONLY | {"answers": [{"answer_id": 3}]}, "fields", "'answers'"),
}  # fmt: skip
LINES: dict[str, tuple[bytes, str]] = {  # name -> line, a word of the message; all are counted as json
    "an object is cut off": (b'{"id": "x", "conversations": [', "not valid JSON"),
    "two objects": (b'{"id": "x"} {"id": "y"}', "not valid JSON"),
    "single quotes": (b"{'id': 'x'}", "not valid JSON"),
    "a comment": (b'{"id": "x"} // a cat', "not valid JSON"),
    "a comma too many": (b'{"id": "x",}', "not valid JSON"),
    "100,000 brackets": (b"[" * 100_000, "not valid JSON"),
    "a number of 5000 digits": (b'{"id": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "not UTF-8": (b'{"id": "\xff\xfe"}', "not UTF-8"),
    "a conversation without an object around it": (
        b'[{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]', "Write one object {...} per row"
    ),
    "a NUL": (b"\x00", "not valid JSON"),
    "half a character": (rb'{"conversations": [{"from": "human", "value": "\ud83d"}]}', "half of a surrogate pair"),
    "halves in the wrong order": (
        rb'{"conversations": [{"from": "human", "value": "\uDE00\uD83D"}]}', "half of a surrogate pair"
    ),
    "a byte order mark inside": (b'\xef\xbb\xbf{"id": "x"}', "not valid JSON"),
    "plain text": (b"What is this? A cat.", "not valid JSON"),
    "a line of CSV": (b'1,a.jpg,"What is this?",A cat', "not valid JSON"),
}  # fmt: skip
_WHOLE = json.dumps([record(f"Q{n}", "A", id=str(n)) for n in range(4)])
FILES: dict[str, tuple[str, Callable[[], bytes], list[str]]] = {  # name -> file, content, words of the message
    "an array without its end": ("a.json", lambda: _WHOLE[:-1].encode(), ["cut off", "Write the file again"]),
    "an array cut off in a record": ("a.json", lambda: _WHOLE[:150].encode(), ["row 2", "cut off", "Write the file again"]),
    "nothing": ("a.json", lambda: b"", ["not a JSON array", ".jsonl"]),
    "no line": ("a.jsonl", lambda: b"", ["no record", "Check the file"]),
    "blank lines": ("a.jsonl", lambda: b"\n \n\t\n", ["no record", "Check the file"]),
    "an empty array": ("a.json", lambda: b"[]", ["no record", "Check the file"]),
    "one object": ("a.json", lambda: json.dumps(TEXT_ONLY).encode(), ["not a JSON array", ".jsonl"]),
    "lines in a .json file": ("a.json", lambda: b'{"id": 1}\n{"id": 2}\n', ["not a JSON array", "per line: name it .jsonl"]),
    "objects over several lines in a .json file": (
        "a.json", lambda: json.dumps(TEXT_ONLY, indent=1).encode() + b"\n{}", ["not a JSON array", "Write [record, ...], or"]
    ),
    "lists in an array": ("a.json", lambda: f"[{_WHOLE}]".encode(), ["row 1", "Write one object {...} per row"]),
    "a public data set's questions": (
        "a.json", lambda: b'{"info": {}, "questions": [{"question_id": 1}]}', ["not a JSON array", "prepare --help"]
    ),
    "an export of Label Studio": (
        "a.json", lambda: b'[{"id": 1, "data": {"image": "a.png"}, "annotations": []}]', ["Label Studio", "JSON-MIN"]
    ),
    "single quotes in an array": ("a.json", lambda: b"[{'id': 1}]" + b" " * 99, ["row 1", "not valid JSON", "Correct it"]),
    "two arrays": ("a.json", lambda: f"{_WHOLE} {_WHOLE}".encode(), ["after the end of the array", "one array"]),
    "an array of 100,000 brackets": ("a.json", lambda: b"[" * 100_000, ["row 1", "not valid JSON"]),
    "an array in Latin-1": ("a.json", lambda: '[{"id": "\xe9"}]'.encode("latin-1"), ["not UTF-8", "Save it as UTF-8"]),
    "an array in UTF-16": ("a.json", lambda: _WHOLE.encode("utf-16"), ["not UTF-8", "Save it as UTF-8"]),
    "a record of 100 MB in an array": ("a.json", lambda: b'[{"id": "' + b"x" * 100_000_000 + b'"}]',
        ["row 1", "longer than 16 MiB", "one conversation per record"]),
    "a line of 100 MB": ("a.jsonl", lambda: b'{"id": "' + b"x" * 100_000_000 + b'"}',
        ["row 1", "longer than 16 MiB", "one conversation per row"]),
    "no Parquet": ("a.parquet", lambda: b"[]", ["not a readable Parquet file", "Write the file again"]),
    "an empty Parquet file": ("a.parquet", lambda: b"", ["not a readable Parquet file", "Write the file again"]),
    "a table of another kind": ("a.csv", lambda: b"id\n1\n", ["'.csv'", ".jsonl", "prepare csv"]),
    "a file without a suffix": ("data", lambda: _WHOLE.encode(), ["''", ".jsonl"]),
}  # fmt: skip
