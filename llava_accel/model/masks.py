"""Which token of a row attends to which, in the form that each attention kernel takes. Rows are forests: `data/trie.py`."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

_ALIGNED = 8  # entries, for rows of a mask in sdpa on a GPU (torch 2.13, native/transformers/attention.cpp: pad_bias)


def sees(query: Tensor, key: Tensor, subtree_end: Tensor) -> Tensor:
    """Whether the token at place `query` attends to the one at `key`: to itself, and to its ancestors in the forest.

    Padding attends only to itself, as a softmax needs one key.

    Args:
        subtree_end: Where the key's subtree ends (`data/trie.py`).
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
    """`forest_mask` as a kernel takes it: blocks for flex_attention, for others numbers that they add to the scores.

    Args:
        kernel: transformers' name for it.
        dtype: The scores' type.
    """
    assert kernel != "flash_attention_2", "it takes no mask; the recipe's checks refuse what needs one"
    if kernel == "flex_attention":
        return forest_blocks(subtree_end)
    mask = forest_mask(subtree_end)
    rows, _, seq, _ = mask.shape
    # From booleans, sdpa would make this again in every layer and keep each copy for the backward pass. On a GPU it also
    # copies a mask whose rows do not begin at a multiple of 8 entries: hence the room at the end of each row.
    room = torch.zeros((rows, 1, seq, -(-seq // _ALIGNED) * _ALIGNED), dtype=dtype, device=mask.device)
    return room[..., :seq].masked_fill_(mask.logical_not_(), -torch.inf)
