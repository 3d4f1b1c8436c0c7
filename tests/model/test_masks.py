"""A token attends to its own path in a row of branches, whatever kernel computes it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask
from transformers.integrations.flex_attention import WrappedFlexAttention

from helpers.toys import MIXED, VOCABULARY, about_one_image, assert_same, batch_of, full_logits_loss, make_llava, talk
from llava_accel.data.trie import build_row, chain, pack_rows
from llava_accel.kernels.compiled import MOST_KINDS, keep_flex_compiled
from llava_accel.model.build import attention
from llava_accel.model.masks import attention_mask, forest_blocks, forest_mask
from llava_accel.model.objective import Objective


def test_blocks_are_the_boolean_mask() -> None:
    rows = [build_row(about_one_image()), *pack_rows([chain(example) for example in MIXED])]
    subtree_end = batch_of(rows)["subtree_end"]
    assert isinstance(subtree_end, torch.Tensor) and (subtree_end == 0).any()
    blocks, mask = forest_blocks(subtree_end), forest_mask(subtree_end)
    row, query, key = torch.meshgrid(*(torch.arange(n) for n in mask[:, 0].shape), indexing="ij")
    assert torch.equal(blocks.mask_mod(row, torch.zeros_like(row), query, key), mask[:, 0])


def test_empty_blocks_are_skipped() -> None:
    """Three texts of 256 tokens side by side: 6 of 9 pairs of texts need no score, and half of the others."""
    ends = torch.tensor([256, 512, 768]).repeat_interleave(256)[None]
    blocks = forest_blocks(ends)
    assert blocks.full_kv_num_blocks is not None
    assert int((blocks.kv_num_blocks + blocks.full_kv_num_blocks).sum()) == 3 * 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_separate_rows(attention: str) -> None:
    short = [talk(30 + n, 3 + n % 3, 2, "ab"[n % 2] if n % 3 else "") for n in range(6)]
    examples = [talk(20, 20, 9, "c", rounds=2), *short]
    rows = [chain(example) for example in examples]
    packed = pack_rows(rows)
    assert len(packed) == 2
    model = make_llava(attention=attention)
    assert_same(model, Objective(model, VOCABULARY)(**batch_of(packed)), full_logits_loss(model, examples))


@pytest.mark.parametrize("seq", [8, 9, 15])
def test_lines_of_a_mask_begin_where_the_kernel_takes_them(seq: int) -> None:
    """From another place a GPU would copy the whole mask in every layer."""
    ends = torch.tensor([[seq] * seq, [4] * 4 + [seq - 2] * (seq - 6) + [0, 0]])
    mask = attention_mask(ends, "sdpa", torch.float32)
    assert isinstance(mask, torch.Tensor) and mask.stride() == (
        seq * mask.stride(2),
        seq * mask.stride(2),
        16 - 8 * (seq == 8),
        1,
    )
    assert torch.equal(mask == 0, forest_mask(ends)) and torch.equal(mask.isinf(), ~forest_mask(ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_share_one_mask(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As booleans each layer would keep a copy of its own: 28 of 150 MB for a question on an image of 8,700 tokens."""
    calls = watch_attention(monkeypatch)
    Objective(make_llava(), VOCABULARY, dtype)(**batch_of([build_row(about_one_image())])).backward()
    masks = [mask for mask, _ in calls if mask is not None]
    assert len(masks) == 2 and {mask.data_ptr() for mask in masks} == {masks[0].data_ptr()}
    assert masks[0].dtype == dtype


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3, 5), (4,)])
def test_chains_need_no_mask(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What attends to the left alone never sees padding to its right; without a mask a GPU takes its fastest kernel."""
    calls = watch_attention(monkeypatch)
    rows = [chain(talk(20 + at, length, 2, "a")) for at, length in enumerate(lengths)]
    Objective(make_llava(), VOCABULARY)(**batch_of(rows)).backward()
    decoder = calls[-2:]  # the tower's layers come first, and see all of an image
    assert decoder == [(None, True)] * 2 and len(calls) > 2


def watch_attention(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor | None, bool]]:
    """What comes to be there with each call of sdpa: its mask, and whether it is causal."""
    calls: list[tuple[torch.Tensor | None, bool]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: Any) -> torch.Tensor:
        calls.append((attn_mask, bool(rest.get("is_causal"))))
        return attend(*tensors, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return calls


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mathematics of FlexAttention, gradients included: on a CPU only its compiled kernel has none."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "__init__", lambda *_: None)
    monkeypatch.setattr(WrappedFlexAttention, "_compiled_flex_attention", staticmethod(flex_attention.flex_attention))


@pytest.mark.usefixtures("flex_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_separate_rows() -> None:
    model, examples = make_llava(attention="flex_attention"), about_one_image()
    weights = [1.0, 0.7, 0.3, 1.0, 2.0]
    row = build_row([replace(each, weight=weight) for each, weight in zip(examples, weights, strict=True)])
    ours = Objective(model, VOCABULARY)(**batch_of([row, chain(MIXED[0])]))
    model.set_attn_implementation("sdpa")
    assert_same(model, ours, full_logits_loss(model, [*examples, MIXED[0]], [*weights, 1.0]))


@pytest.mark.slow
def test_every_kind_of_call_of_flex_attention_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.compile's own limit the last kinds would be computed as one matrix of all scores."""
    config, graphs = torch.compiler.config, []
    monkeypatch.setattr(config, "recompile_limit", config.recompile_limit)
    monkeypatch.setattr(config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)

    def note(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compute = torch.compile(flex_attention.flex_attention, backend=note)
    keep_flex_compiled()
    for has_gradient in (True, False):
        for length, rows in itertools.product((140, 300), (2, 1, 3)):
            states = torch.ones(rows, 1, length, 16, requires_grad=has_gradient)
            ends = torch.full((rows, length), length)
            with torch.set_grad_enabled(has_gradient):
                for mask in (forest_blocks(ends), create_block_mask(causal, rows, None, length, length, "cpu")):
                    compute(states, states, states, block_mask=mask)
    assert 8 < len(graphs) < MOST_KINDS / 2
    torch.compiler.reset()


def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What transformers lets rows without branches see."""
    return key <= query


def test_flex_attention_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"model\.attention: flex_attention .*CPU.*sdpa"):
        attention("flex_attention")
