"""Attention in one call of `scaled_dot_product_attention` over all pairs of frames of a row. Imported only if used."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.model.attention.heads import add_bias, split_heads
from bestrq.model.attention.masks import AttentionLayout


def make_dense_mask(first_key: Tensor, stop_key: Tensor) -> Tensor:
    """Mask of all pairs of frames, bool `[R, 1, T, T]`, from int64 `[R, T]`; its memory is quadratic in the row."""
    key = torch.arange(first_key.shape[1], device=first_key.device)
    return ((key >= first_key[..., None]) & (key < stop_key[..., None]))[:, None]


def make_padding_mask(valid: Tensor) -> Tensor:
    """Mask of keys, bool `[R, 1, 1, T]` from bool `[R, T]`, for rows of one segment without further masking.

    A mask for each query would take 8 GB for an hour. In an empty row all keys are allowed, as a softmax over no keys
    is NaN.
    """
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


def attend_dense(qkv: Tensor, num_heads: int, layout: AttentionLayout, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention in one call over all rows, `[R, T, H + 2 * KV, d] -> [R, T, H, d]`.

    Args:
        bias: `[H, 2 * D + 1]`, added to the score of query i and key j at `clamp(j - i, -D, D) + D`, or None.
    """
    assert isinstance(layout.backend_mask, Tensor)
    q, k, v = split_heads(qkv, num_heads, layout.rotary_phase)
    mask = layout.backend_mask
    if bias is not None:
        frame = torch.arange(q.shape[2], device=q.device)
        mask = add_bias(mask, bias, frame - frame[:, None], q.dtype)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=grouped).transpose(1, 2)
