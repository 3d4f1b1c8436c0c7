"""A chat template on which training would not match generation is refused before any data is read."""

import pytest

from helpers.samples import LLAVA, llama
from llava_accel.data.conversation import Turn
from llava_accel.data.jinja_template import ChatTemplate
from llava_accel.sources.problems import DataError

QUESTION, ANSWER = Turn("user", "What is it?"), Turn("assistant", "A cat.")


def test_a_generation_prompt_that_is_not_how_answers_begin_is_refused() -> None:
    template = LLAVA.replace("'ASSISTANT:'", "'ASSISTANT: Well,'")
    with pytest.raises(ValueError, match=r"generation prompt.*Well.*v1, plain"):
        ChatTemplate(llama(), template)


def test_a_template_that_drops_texts_is_refused() -> None:
    template = LLAVA.replace("c['text']", "'...'")
    with pytest.raises(ValueError, match="drops"):
        ChatTemplate(llama(), template)


def test_a_template_that_drops_images_is_refused() -> None:
    template = ChatTemplate(llama(), LLAVA.replace("<image>\n", ""))
    with pytest.raises(ValueError, match="<image> for each image"):
        template([Turn("user", "<image>\nWhat?"), ANSWER], True)


def test_no_template_and_no_valid_template_are_refused() -> None:
    with pytest.raises(ValueError, match=r"which has none.*v1, plain"):
        ChatTemplate(llama(), None)
    with pytest.raises(ValueError, match="refuses"):
        ChatTemplate(llama(), "{% for %}")


def test_a_record_that_the_template_refuses_is_a_data_error() -> None:
    template = ChatTemplate(
        llama(), "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAVA
    )
    with pytest.raises(DataError, match="no system") as caught:
        template([Turn("system", "s"), QUESTION, ANSWER], False)
    assert caught.value.kind == "roles"
