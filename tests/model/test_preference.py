"""The losses of pairs, by their formulas and against the plain computation of whole sequences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.toys import IMAGES, PX, VOCABULARY, assert_same, full_logits_loss, make_llava, talk
from llava_accel.data.collate import collate
from llava_accel.data.labels import Example
from llava_accel.data.trie import Row, chain, pack_rows, share_rows
from llava_accel.model.preference import Preference, pair_losses
from llava_accel.recipe.tables import PreferenceTable

GAINED = torch.tensor([[0.4, -1.2], [-0.3, 0.9], [2.5, 2.5]])
LENGTHS = torch.tensor([[2.0, 3.0], [5.0, 1.0], [4.0, 4.0]])
CHOSEN, REJECTED = GAINED.unbind(-1)
MARGIN = 0.3 * (CHOSEN - REJECTED)


def sigmoid(values: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-values))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, -sigmoid(MARGIN).log()),
        ({"label_smoothing": 0.1}, -0.9 * sigmoid(MARGIN).log() - 0.1 * sigmoid(-MARGIN).log()),
        ({"loss": "hinge"}, (1 - MARGIN).clamp(min=0)),
        ({"loss": "ipo"}, (CHOSEN / LENGTHS[:, 0] - REJECTED / LENGTHS[:, 1] - 1 / 0.6) ** 2),
        (
            {"loss": "robust", "label_smoothing": 0.1},
            (-0.9 * sigmoid(MARGIN).log() + 0.1 * sigmoid(-MARGIN).log()) / 0.8,
        ),
        (
            {"loss_weight": 0.8, "bco_weight": 0.2},
            -0.8 * sigmoid(MARGIN).log() - 0.2 * (sigmoid(0.3 * CHOSEN).log() + sigmoid(-0.3 * REJECTED).log()),
        ),
    ],
    ids=["sigmoid", "smoothed", "hinge", "ipo", "robust", "mixed"],
)
def test_each_loss_is_that_of_its_paper(changes: Mapping[str, Any], expected: Tensor) -> None:
    found = pair_losses(GAINED, LENGTHS, PreferenceTable(beta=0.3, **changes))
    assert torch.allclose(found, expected, atol=1e-6)


def pair(seed: int, question: int, answers: tuple[int, int], images: str = "") -> list[Example]:
    """A chosen and a rejected answer of so many tokens to one question; the first token of both is the same."""
    chosen, other = talk(seed, question, answers[0], images), talk(seed + 100, question, answers[1], images)
    prompt = chosen.prompt_length()
    ids = np.concatenate([chosen.input_ids[: prompt + 1], other.input_ids[prompt + 1 :]])
    return [chosen, replace(other, input_ids=ids, index=seed, num_repeated=prompt + 1)]


PAIRS = [*pair(1, 5, (3, 4), "a"), *pair(2, 4, (2, 1)), *pair(3, 6, (5, 2), "a"), *pair(4, 3, (4, 6), "cb")]
REFERENCE = [-9.0, -14.5, -6.0, -2.25, -21.0, -7.5, -17.0, -23.0]


def shared(examples: Sequence[Example]) -> list[Row]:
    return share_rows(examples, 1000)


def split(examples: Sequence[Example]) -> list[Row]:
    return share_rows(examples, 12)


def apart(examples: Sequence[Example]) -> list[Row]:
    return [chain(example) for example in examples]


def packed(examples: Sequence[Example]) -> list[Row]:
    return pack_rows(apart(examples))


@pytest.mark.parametrize("layout", [shared, split, apart, packed])
def test_pairs_in_any_layout_equal_whole_sequences(layout: Callable[[Sequence[Example]], list[Row]]) -> None:
    model, table = make_llava(), PreferenceTable(beta=0.2, loss_weight=0.8, bco_weight=0.2, sft_weight=0.7)
    objective = Preference(model, VOCABULARY)
    objective.table = table
    numbered = [replace(example, number=number) for number, example in enumerate(PAIRS)]
    batch = collate(layout(numbered), IMAGES, (3, PX, PX), reference=REFERENCE)
    terms, counts = objective(**batch), objective.count(batch)
    assert counts.tolist() == [4, 3 + 2 + 5 + 4]
    log_probs = torch.stack([-full_logits_loss(model, [example]) for example in PAIRS])
    gained = (log_probs - torch.tensor(REFERENCE)).view(4, 2)
    lengths = torch.tensor([float(example.num_targets) for example in PAIRS]).view(4, 2)
    expected = pair_losses(gained, lengths, table).sum() / 4 - 0.7 * log_probs[0::2].sum() / 14
    measured = {name: value.item() / 4 for name, value in objective.measured.items()}
    margins = 0.2 * (gained[:, 0] - gained[:, 1])
    assert measured["pair_accuracy"] == (margins > 0).float().mean().item()
    assert measured["reward_margin"] == pytest.approx(margins.mean().item(), rel=1e-5)
    assert measured["rejected_log_prob"] == pytest.approx(log_probs[1::2].mean().item(), rel=1e-5)
    assert measured["kl"] == pytest.approx((gained / lengths).mean().item(), rel=1e-5)
    assert_same(model, (terms / counts).sum(), expected)


def test_a_rank_without_pairs_gives_a_loss_of_nothing() -> None:
    objective = Preference(make_llava(), VOCABULARY)
    batch = collate([], {}, (3, PX, PX))
    assert objective(**batch).tolist() == [0, 0] and objective.count(batch).tolist() == [0, 0]
