"""The template that goes with a model; where a base has another one of its own, the user learns of it."""

from pathlib import Path

import pytest

from helpers.samples import CHATML, CHATML_PARTS, LLAVA, byte_level, llama
from llava_accel.exceptions import UserError
from llava_accel.model.chat_template import choose_template

LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
REFUSING = "{{ raise_exception('no') }}"


@pytest.mark.parametrize(
    ("own", "name", "is_said"),
    [
        (LLAMA3, "v1", True),
        (CHATML_PARTS, "v1", True),
        (CHATML, "chatml", False),
        (LLAVA, "v1", False),
        (LLAVA, "chatml", True),
        (LLAMA3, "plain", False),
        (REFUSING, "v1", False),
        (None, "v1", False),
    ],
)
def test_a_base_with_another_template_of_its_own_is_named(
    tmp_path: Path, own: str | None, name: str, is_said: bool
) -> None:
    if own:
        (tmp_path / "chat_template.jinja").write_text(own)
    _, notes = choose_template(name, tmp_path, llama() if name == "v1" else byte_level())
    assert len(notes) == is_said
    assert not notes or (f"model.template = '{name}'" in notes[0] and 'model.template = "auto"' in notes[0])


def test_answers_end_in_a_template_that_had_no_end(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(LLAVA)
    template, notes = choose_template("auto", tmp_path, llama())
    assert template and template.endswith(LLAVA) and len(notes) == 1 and "'</s>'" in notes[0]
    said = [("user", "What?"), ("assistant", "Red."), ("user", "Sure?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    rendered = llama().apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert rendered == "USER: What? ASSISTANT: Red.</s> USER: Sure? ASSISTANT:"
    assert messages[1]["content"] == [{"type": "text", "text": "Red."}], "what the caller holds is not changed"


def test_a_template_of_strings_ends_answers_too(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    template, _ = choose_template("auto", tmp_path, llama())
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    assert "Ho</s><|start_header_id|>user" in llama().apply_chat_template(
        messages, chat_template=template, tokenize=False
    )


@pytest.mark.parametrize("own", [CHATML, CHATML_PARTS])
def test_a_template_with_ends_is_left_as_it_is(tmp_path: Path, own: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(own)
    assert choose_template("auto", tmp_path, byte_level()) == (own, [])
    assert choose_template("auto", tmp_path / "none", byte_level()) == (None, [])


def test_a_template_that_fills_the_memory_is_refused_where_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ 'a' * 10 ** 11 }}")
    with pytest.raises(UserError, match=r"model\.template: .*memory.*v1"):
        choose_template("auto", tmp_path, llama())
    template, notes = choose_template("v1", tmp_path, llama())
    assert template and notes == []
