"""Who attends to whom in a row of branches, in the form that each attention kernel takes."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def attention_mask(
    subtree_end: Int[Tensor, "rows seq"], kernel: str, dtype: torch.dtype
) -> Bool[Tensor, "rows 1 seq seq"] | Float[Tensor, "rows 1 seq seq"] | BlockMask:
    """`forest_mask` as the kernel takes it: sdpa as booleans, flex_attention as blocks, eager as what it adds to scores.

    Args:
        kernel: transformers' name of it.
        dtype: Of the scores.
    """
    assert kernel != "flash_attention_2", "it takes no mask; the recipe's checks refuse what needs one"
    if kernel == "flex_attention":
        return forest_blocks(subtree_end)
    mask = forest_mask(subtree_end)
    if kernel == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def forest_mask(subtree_end: Int[Tensor, "rows seq"]) -> Bool[Tensor, "rows 1 seq seq"]:
    """Token i may attend to j: `j <= i < subtree_end[j]`. Padding attends to itself alone, as a softmax needs one."""
    place = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    query, key = place[:, None], place[None, :]
    mask = (key <= query) & (query < subtree_end[:, None, :]) | (key == query)
    return mask[:, None]


def forest_blocks(subtree_end: Int[Tensor, "rows seq"]) -> BlockMask:
    """`forest_mask` for FlexAttention, which skips the blocks of queries and keys that it leaves empty."""
    rows, seq = subtree_end.shape
    return create_block_mask(
        lambda row, _, query, key: (key <= query) & (query < subtree_end[row, key]) | (key == query),
        B=rows,
        H=None,
        Q_LEN=seq,
        KV_LEN=seq,
        device=subtree_end.device,
    )
