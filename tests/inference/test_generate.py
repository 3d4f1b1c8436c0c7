"""Greedy answers of a batch: what may be written, and where an answer ends."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from helpers.toys import IMAGE_ID, IMAGES, PX, VOCABULARY, make_llava, talk
from llava_accel.inference.generate import build_prompts, generate
from llava_accel.model.objective import Objective

CPU = torch.device("cpu")
MIXED = [talk(1, 5, 3, "a"), talk(3, 4, 1), talk(4, 9, 5, "ca"), talk(5, 3, 2, "bad", rounds=2)]


@pytest.fixture
def objective() -> Objective:
    """A random LLaVA."""
    return Objective(make_llava(), VOCABULARY)


def _prefer(objective: Objective, token: int) -> None:
    """Make the model want to write one token above all."""

    def hook(module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits + 1e4 * (torch.arange(logits.shape[-1]) == token)

    objective.llava.lm_head.register_forward_hook(hook)


def test_the_image_token_is_never_written(objective: Objective) -> None:
    _prefer(objective, IMAGE_ID)
    answers = generate(objective, build_prompts(MIXED, IMAGES, (3, PX, PX), CPU), stop_ids=[2], max_new_tokens=3)
    assert len(answers) == 4 and not any(IMAGE_ID in answer for answer in answers)


def test_rows_behind_the_vocabulary_are_never_written() -> None:
    objective = Objective(make_llava(), VOCABULARY - 7)
    _prefer(objective, VOCABULARY - 3)
    answers = generate(objective, build_prompts(MIXED, IMAGES, (3, PX, PX), CPU), stop_ids=[2], max_new_tokens=3)
    assert all(token < VOCABULARY - 7 for answer in answers for token in answer)


def test_an_answer_ends_before_its_stop_token(objective: Objective) -> None:
    prompts = build_prompts(MIXED, IMAGES, (3, PX, PX), CPU)
    whole = generate(objective, prompts, stop_ids=[2], max_new_tokens=5)
    assert all(len(answer) == 5 for answer in whole), "the random model does not stop by itself"
    stop = whole[0][2]
    stopped = generate(objective, prompts, stop_ids=[stop], max_new_tokens=5)
    for answer, full in zip(stopped, whole, strict=True):
        assert answer == full[: full.index(stop)] if stop in full else answer == full


def test_a_batch_of_text_needs_no_image(objective: Objective) -> None:
    text = [talk(3, 4, 1), talk(6, 2, 1)]
    expected = generate(objective, build_prompts(text, {}, (3, PX, PX), CPU), stop_ids=[2], max_new_tokens=4)
    # Where the tower is trained it runs even so; the answers are the same.
    objective.tower_on_every_rank = True
    assert generate(objective, build_prompts(text, {}, (3, PX, PX), CPU), stop_ids=[2], max_new_tokens=4) == expected


def test_a_prompt_ends_before_the_last_answer() -> None:
    prompts = build_prompts(MIXED, IMAGES, (3, PX, PX), CPU)
    lengths = [len(example.input_ids) - int(example.is_target.sum()) for example in MIXED[:3]]
    lengths.append(len(MIXED[3].input_ids) - 2)  # the answer of its first round is part of the prompt
    assert prompts.attention_mask.sum(1).tolist() == lengths
    for row, (example, length) in enumerate(zip(MIXED, lengths, strict=True)):
        assert prompts.input_ids[row, -length:].tolist() == example.input_ids[:length].tolist()


def test_a_image_of_several_prompts_is_there_once() -> None:
    prompts = build_prompts(MIXED, IMAGES, (3, PX, PX), CPU)
    assert len(prompts.pixel_values) == 4 and len(prompts.image_index) == 6


def test_answers_are_those_of_transformers_for_one_prompt_at_a_time(objective: Objective) -> None:
    together = generate(objective, build_prompts(MIXED, IMAGES, (3, PX, PX), CPU), stop_ids=[2], max_new_tokens=8)
    config = GenerationConfig(max_new_tokens=8, eos_token_id=2, pad_token_id=0, suppress_tokens=[IMAGE_ID])
    alone = []
    for example in MIXED:
        ids = torch.from_numpy(example.input_ids[: example.prompt_length()])[None]
        images = [IMAGES[name].tensor for name in example.images]
        pixels = {"pixel_values": torch.stack(images)} if images else {}
        answer = objective.llava.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **pixels
        )
        alone.append(answer[0, ids.shape[1] :].tolist())
    assert together == alone and len({tuple(answer) for answer in alone}) == len(alone)
