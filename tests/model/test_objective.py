"""The objective equals the padded computation with all logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration

from helpers.toys import (
    IMAGE_ID,
    MIXED,
    PATCHES,
    VOCABULARY,
    about_one_image,
    assert_same,
    batch_of,
    full_logits_loss,
    make_llava,
    talk,
)
from llava_accel.data.trie import build_row, chain
from llava_accel.model.objective import Objective


@pytest.fixture(params=["clip", "siglip"])
def tower(request: pytest.FixtureRequest) -> str:
    """Both kinds of vision tower."""
    return request.param


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    """A random LLaVA with a CLIP tower."""
    return make_llava()


def test_mixed_rows_equal_the_padded_full_logits_computation(tower: str) -> None:
    model = make_llava(tower)
    ours = Objective(model, VOCABULARY)(**batch_of([chain(example) for example in MIXED]))
    assert_same(model, ours, full_logits_loss(model, MIXED))


def test_weights_scale_the_loss_of_their_example(llava: LlavaForConditionalGeneration) -> None:
    weights = [0.3, 1.0, 2.5, 1.0, 0.3]
    rows = [chain(replace(example, weight=weight)) for example, weight in zip(MIXED, weights, strict=True)]
    assert_same(llava, Objective(llava, VOCABULARY)(**batch_of(rows)), full_logits_loss(llava, MIXED, weights))


def test_lora_layers_get_the_gradients_of_the_full_logits_computation(llava: LlavaForConditionalGeneration) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r"model\.language_model\..*_proj", init_lora_weights=False)
    model = get_peft_model(llava, config)
    llava.model.multi_modal_projector.requires_grad_(True)
    ours = Objective(model, VOCABULARY)(**batch_of([chain(example) for example in MIXED]))
    assert_same(model, ours, full_logits_loss(model, MIXED))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_many_examples_equals_separate_rows(attention: str) -> None:
    model, examples = make_llava(attention=attention), about_one_image()
    weights = [1.0, 0.7, 0.3, 1.0, 2.0]
    row = build_row([replace(each, weight=weight) for each, weight in zip(examples, weights, strict=True)])
    assert len(row) < sum(len(example.input_ids) for example in examples) - 3 * PATCHES
    # A short row beside it, so that the padding of a branched batch is there too.
    ours = Objective(model, VOCABULARY)(**batch_of([row, chain(MIXED[0])]))
    assert_same(model, ours, full_logits_loss(model, [*examples, MIXED[0]], [*weights, 1.0]))


@pytest.mark.parametrize("branched", [False, True], ids=["chains", "branches"])
def test_padding_cannot_change_the_loss(llava: LlavaForConditionalGeneration, branched: bool) -> None:
    objective = Objective(llava, VOCABULARY)
    first = build_row(about_one_image()) if branched else chain(MIXED[0])
    batch = batch_of([first, chain(MIXED[1]), chain(MIXED[2])])
    assert batch["branched"] is branched
    expected = objective(**batch)
    garbage, padding = batch["input_ids"].clone(), batch["subtree_end"] == 0
    assert padding.any()
    garbage[padding] = torch.randint(3, IMAGE_ID, (int(padding.sum()),))
    ours = objective(**{**batch, "input_ids": garbage})
    assert torch.equal(ours, expected)


def test_rows_behind_the_vocabulary_never_enter_the_softmax(llava: LlavaForConditionalGeneration) -> None:
    rows = [chain(example) for example in MIXED]
    scored = VOCABULARY - 7
    examples = [example.input_ids[example.is_target] for example in MIXED]
    assert max(int(ids.max()) for ids in examples) < VOCABULARY
    batch = batch_of(rows)
    batch["target_ids"] = batch["target_ids"].clamp(max=scored - 1)
    loss = Objective(llava, scored)(**batch)
    loss.backward()
    gradient = llava.lm_head.weight.grad
    assert gradient is not None and not gradient[scored:].any() and gradient[:scored].any()
    with torch.no_grad():
        llava.lm_head.weight[scored:] = 100.0
    assert torch.equal(Objective(llava, scored)(**batch), loss)
    assert Objective(llava, VOCABULARY)(**batch).item() > 2 * loss.item()


def test_the_loss_is_the_cross_entropy_of_the_hidden_states_before_the_targets(
    llava: LlavaForConditionalGeneration,
) -> None:
    example = talk(21, 4, 3)
    ids = torch.from_numpy(example.input_ids)[None]
    logits = llava(input_ids=ids).logits[0]
    first = len(example.input_ids) - 3
    expected = F.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum")
    assert Objective(llava, VOCABULARY)(**batch_of([chain(example)])).item() == pytest.approx(expected.item(), rel=1e-6)
