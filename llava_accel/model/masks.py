"""Which token of a row attends to which, in the form that each attention kernel takes. Rows are forests: `data/trie.py`."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

_ALIGNED = 8  # numbers, of a mask's line for sdpa on a GPU (torch 2.13, native/transformers/attention.cpp: pad_bias)


def sees(query: Tensor, key: Tensor, subtree_end: Tensor) -> Tensor:
    """Whether a token attends to another, by their places: those of a branch, not behind it, and itself.

    Padding attends to itself alone, as a softmax needs one.

    Args:
        subtree_end: Where the branches that hold the other token end (`data/trie.py`).
    """
    return (key <= query) & (query < subtree_end) | (key == query)


def forest_mask(subtree_end: Int[Tensor, "rows seq"]) -> Bool[Tensor, "rows 1 seq seq"]:
    """`sees` for each pair of tokens."""
    place = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    return sees(place[:, None], place, subtree_end[:, None, None, :])


def forest_blocks(subtree_end: Int[Tensor, "rows seq"]) -> BlockMask:
    """`forest_mask` for FlexAttention, which skips the blocks of queries and keys that it leaves empty."""
    rows, seq = subtree_end.shape
    return create_block_mask(
        # `sees`, written out: it becomes a part of the kernel.
        lambda row, _, query, key: (key <= query) & (query < subtree_end[row, key]) | (key == query),
        B=rows,
        H=None,
        Q_LEN=seq,
        KV_LEN=seq,
        device=subtree_end.device,
    )


def attention_mask(
    subtree_end: Int[Tensor, "rows seq"], kernel: str, dtype: torch.dtype
) -> Float[Tensor, "rows 1 seq seq"] | BlockMask:
    """`forest_mask` as the kernel takes it: flex_attention as blocks, the others as what they add to scores.

    Args:
        kernel: transformers' name of it.
        dtype: Of the scores.
    """
    assert kernel != "flash_attention_2", "it takes no mask; the recipe's checks refuse what needs one"
    if kernel == "flex_attention":
        return forest_blocks(subtree_end)
    mask = forest_mask(subtree_end)
    rows, _, seq, _ = mask.shape
    # Of booleans sdpa makes this in every layer, and keeps each for the backward pass. So it does on a GPU of a mask whose
    # lines do not begin at a multiple of 8 numbers: these have room for that at their end.
    room = torch.zeros((rows, 1, seq, -(-seq // _ALIGNED) * _ALIGNED), dtype=dtype, device=mask.device)
    return room[..., :seq].masked_fill_(mask.logical_not_(), -torch.inf)
