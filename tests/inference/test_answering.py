"""Answers from shared prefixes are those of each prompt by itself, and nothing is computed twice for them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from helpers.toys import (
    IMAGE_ID,
    IMAGES,
    MIXED,
    PATCHES,
    PIXELS,
    PX,
    VOCABULARY,
    about_one_image,
    batch_of,
    make_llava,
    watch,
)
from llava_accel.data.labels import Example
from llava_accel.data.loader import Loaded
from llava_accel.data.questions import Questions, ask
from llava_accel.data.records import Record
from llava_accel.data.trie import share_rows
from llava_accel.inference.answering import Answered, answer_batch, question_batch
from llava_accel.model.objective import Objective

TOKENS = 6
EXAMPLES = [*about_one_image(), *MIXED]


@pytest.fixture
def objective() -> Objective:
    """A random LLaVA."""
    return Objective(make_llava(), VOCABULARY)


def asked(examples: Sequence[Example], max_length: int = 999) -> tuple[Loaded, Questions]:
    """The batch of some examples, and what it asks."""
    by_index = {example.index: example for example in examples}
    rows = share_rows(examples, max_length)
    records = {index: Record(id=str(index), turns=()) for index in by_index}
    return batch_of(rows), ask(rows, by_index, records)


def answered(objective: Objective, examples: Sequence[Example], max_length: int = 999) -> dict[int, list[int]]:
    batch, questions = asked(examples, max_length)
    found = answer_batch(objective, batch, questions, stop_ids=frozenset({2}), max_new_tokens=TOKENS)
    return dict(zip(questions.indices.tolist(), found.ids, strict=True))


def alone(objective: Objective, example: Example) -> list[int]:
    """What transformers' own loop writes behind one prompt."""
    config = GenerationConfig(max_new_tokens=TOKENS, eos_token_id=2, pad_token_id=0, suppress_tokens=[IMAGE_ID])
    ids = torch.from_numpy(example.input_ids[: example.prompt_length()])[None]
    pixels = {"pixel_values": torch.stack([PIXELS[view.file] for view in example.images])} if example.images else {}
    mask = torch.ones_like(ids)
    answer = objective.llava.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids=ids, attention_mask=mask, generation_config=config, **pixels
    )
    return answer[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("max_length", [999, 16])
def test_answers_are_those_of_transformers_for_one_prompt_at_a_time(objective: Objective, max_length: int) -> None:
    expected = {example.index: alone(objective, example) for example in EXAMPLES}
    assert answered(objective, EXAMPLES, max_length) == expected
    assert len({tuple(ids) for ids in expected.values()}) >= len(expected) - 1  # one question stands there twice


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_every_attention_kernel_gives_these_answers(objective: Objective, attention: str) -> None:
    expected = answered(objective, EXAMPLES)
    other = Objective(make_llava(), VOCABULARY)
    other.llava.config.text_config._attn_implementation = attention  # pyright: ignore
    assert answered(other, EXAMPLES) == expected
    assert other.llava.model.language_model.config._attn_implementation == attention


def test_the_loss_of_each_example_is_the_plain_one(objective: Objective) -> None:
    batch, questions = asked(EXAMPLES)
    found = answer_batch(objective, batch, questions, stop_ids=frozenset({2}), max_new_tokens=1)
    parts = found.losses.split(questions.num_targets.tolist())
    by_index = {example.index: example for example in EXAMPLES}
    for index, losses in zip(questions.indices.tolist(), parts, strict=True):
        example = by_index[index]
        ids = torch.from_numpy(example.input_ids)[None]
        pixels = {"pixel_values": torch.stack([PIXELS[view.file] for view in example.images])} if example.images else {}
        with torch.no_grad():
            logits = objective.llava(input_ids=ids, **pixels).logits[0, :-1]
        targets = torch.from_numpy(example.is_target)[1:]
        expected = F.cross_entropy(logits[targets], ids[0, 1:][targets], reduction="none")
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_a_image_and_its_prefix_run_once_for_all_questions_on_it(objective: Objective) -> None:
    questions = [example for example in about_one_image() if [view.file for view in example.images] == ["a"]]
    assert len(questions) == 4
    images: list[int] = []
    watch(objective.tower.get_submodule("encoder.layers.0"), images)
    tokens: list[int] = []
    objective.llava.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(args[0].shape[0] * args[0].shape[1]), with_kwargs=True
    )
    answered(objective, questions)
    prefix = 1 + PATCHES
    assert images == [1]
    # One of the questions stands there twice, with two answers: it runs once, too.
    apart = sum(len(example.input_ids) - prefix for example in questions)
    assert tokens[0] < prefix + apart < sum(len(example.input_ids) for example in questions)
    assert tokens[1:] == [len(questions)] * (TOKENS - 1), "one token for each answer from there on"


def test_a_blind_answer_needs_no_image_and_is_that_of_a_blank_one(objective: Objective) -> None:
    _, questions = asked(EXAMPLES)
    rows = share_rows(EXAMPLES, 999)
    blank = [replace(row, images=(), image_starts=()) for row in rows]
    found = answer_batch(
        objective, batch_of(blank), questions, stop_ids=frozenset({2}), max_new_tokens=TOKENS, blind=True
    )
    projector = objective.llava.model.multi_modal_projector
    projector.linear_2 = _Nothing(projector.linear_2.out_features)  # pyright: ignore
    seen = answered(objective, EXAMPLES)
    assert dict(zip(questions.indices.tolist(), found.ids, strict=True)) == seen


def test_a_rank_without_questions_goes_on_with_the_others(objective: Objective) -> None:
    objective.is_sharded = objective.tower_on_every_rank = True
    calls: list[int] = []
    watch(objective.llava.lm_head, calls)
    batch, questions = asked([])
    left = [False] * (TOKENS - 1) + [True]
    found = answer_batch(
        objective,
        batch,
        questions,
        stop_ids=frozenset({2}),
        max_new_tokens=99,
        is_over=lambda mine: mine and left.pop(0),
    )
    assert found == Answered(losses=found.losses, ids=[]) and len(found.losses) == 0
    assert calls == [0] * (1 + TOKENS) and not left


def test_an_answer_ends_before_its_stop_token_and_the_batch_with_its_last_answer(objective: Objective) -> None:
    whole = answered(objective, EXAMPLES)
    assert all(len(ids) == TOKENS for ids in whole.values()), "the random model does not stop by itself"
    stop = frozenset(ids[1] for ids in whole.values())
    batch, questions = asked(EXAMPLES)
    calls: list[int] = []
    watch(objective.llava.lm_head, calls)
    found = answer_batch(objective, batch, questions, stop_ids=stop, max_new_tokens=TOKENS)
    for index, ids in zip(questions.indices.tolist(), found.ids, strict=True):
        assert ids == whole[index][: next(n for n, token in enumerate(whole[index]) if token in stop)]
    assert len(calls) == 3  # the reference answers' targets, and two tokens of each answer


def test_the_image_token_is_never_written(objective: Objective) -> None:
    _prefer(objective, IMAGE_ID)
    answers = answered(objective, EXAMPLES).values()
    assert len(answers) == len(EXAMPLES) and not any(IMAGE_ID in ids for ids in answers)


def test_rows_after_the_end_of_the_vocabulary_are_never_written() -> None:
    objective = Objective(make_llava(), VOCABULARY - 7)
    _prefer(objective, VOCABULARY - 3)
    batch, questions = question_batch(MIXED[2:3], {}, (3, PX, PX), torch.device("cpu"))  # its targets lie below
    found = answer_batch(objective, batch, questions, stop_ids=frozenset({2}), max_new_tokens=TOKENS)
    assert all(token < VOCABULARY - 7 for ids in found.ids for token in ids)


def test_every_token_is_handed_on_as_soon_as_it_is_known(objective: Objective) -> None:
    batch, questions = question_batch(MIXED, IMAGES, (3, PX, PX), torch.device("cpu"))
    handed: list[list[int]] = []
    calls: list[int] = []
    watch(objective.llava.lm_head, calls)
    found = answer_batch(
        objective,
        batch,
        questions,
        stop_ids=frozenset({2}),
        max_new_tokens=TOKENS,
        on_tokens=lambda tokens: handed.append([*tokens.tolist(), len(calls)]),
    )
    assert [list(ids) for ids in zip(*handed, strict=True)][:-1] == found.ids
    assert [row[-1] for row in handed] == list(range(handed[0][-1], handed[0][-1] + TOKENS))


def _prefer(objective: Objective, token: int) -> None:
    """Make the model want to write one token above all."""

    def hook(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits + 1e4 * (torch.arange(logits.shape[-1]) == token)

    objective.llava.lm_head.register_forward_hook(hook)


class _Nothing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.new_zeros((*hidden.shape[:-1], self.width))
