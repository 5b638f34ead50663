"""Attention by torch's scaled_dot_product_attention, for CUDA: with a dense mask, or in bands for bounded masks.

A dense mask costs memory quadratic in the length of a row. Bands cost memory and time linear in it: queries in blocks
as wide as the mask reaches, each beside the one slice of keys that any of its queries may see.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.model.positions import rotate

if TYPE_CHECKING:
    from bestrq.model.layout import AttentionLayout


def make_dense_mask(first_key: Tensor, stop_key: Tensor) -> Tensor:
    """bool `[R, 1, T, T]` from int64 `[R, T]`: True where a query sees a key."""
    key = torch.arange(first_key.shape[1], device=first_key.device)
    return ((key >= first_key[..., None]) & (key < stop_key[..., None]))[:, None]


def make_padding_mask(valid: Tensor) -> Tensor:
    """bool `[R, 1, 1, T]` from bool `[R, T]`, for rows of one segment at most, all of which is seen.

    Linear in the length, where a mask a query would take 8 GB for an hour. A softmax over nothing would be NaN: in an
    empty row all frames are seen. What frames of a gap make of the segment nobody reads.
    """
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


def make_band_mask(first_key: Tensor, stop_key: Tensor, before: int, behind: int) -> Tensor:
    """bool `[R, 1, blocks, block, keys]` of blocks of queries, and the keys from `before` their first to `behind` their
    last, from int64 `[R, T]`. Blocks are as long as what else they see, but 64 at least."""
    rows, frames = first_key.shape
    block = min(max(before + behind, 64), frames)
    blocks = -(-frames // block)
    padding = (0, blocks * block - frames)
    query = torch.arange(blocks * block, device=first_key.device).view(blocks, block, 1)
    key = torch.arange(blocks, device=first_key.device)[:, None, None] * block - before
    key = key + torch.arange(before + block + behind, device=first_key.device)
    # What fills the last block sees itself, for a softmax over nothing would be NaN.
    first = F.pad(first_key, padding).view(rows, blocks, block, 1)
    stop = F.pad(stop_key, padding).view(rows, blocks, block, 1)
    seen = (key >= first) & (key < stop) | ((query >= frames) & (key == query))
    return seen[:, None]


def split_heads(qkv: Tensor, num_heads: int, phase: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries `[R, H, T, d]`, turned keys and values `[R, KV, T, d]` of `[R, T, H + 2 * KV, d]`."""
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    turned, v = qkv[:, :, : num_heads + num_kv_heads], qkv[:, :, num_heads + num_kv_heads :]
    if phase is not None:
        turned = rotate(turned, phase[:, :, None]).to(v.dtype)
    q, k = turned.split((num_heads, num_kv_heads), dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attend_dense(qkv: Tensor, num_heads: int, layout: "AttentionLayout", bias: Tensor | None, dropout: float) -> Tensor:
    """One call over all rows with the layout's mask, `[R, T, H + 2 * KV, d] -> [R, T, H, d]`.

    Args:
        bias: `[H, 2 * D + 1]`, added to the score of query i and key j at `clamp(j - i, -D, D) + D`.
    """
    assert isinstance(layout.plan, Tensor)
    q, k, v = split_heads(qkv, num_heads, layout.rotary_phase)
    mask = layout.plan
    if bias is not None:
        frame = torch.arange(q.shape[2], device=q.device)
        mask = _biased(mask, bias, frame - frame[:, None], q.dtype)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=grouped).transpose(1, 2)


def attend_bands(qkv: Tensor, num_heads: int, layout: "AttentionLayout", bias: Tensor | None, dropout: float) -> Tensor:
    """The same in bands: blocks of queries stand in the batch dimension, beside their slices of keys."""
    assert isinstance(layout.plan, Tensor)
    rows, _, blocks, block, span = layout.plan.shape
    q, k, v = split_heads(qkv, num_heads, layout.rotary_phase)
    frames = q.shape[2]
    before, _ = layout.mask.reach
    assert before is not None
    padding = (0, 0, before, blocks * block + span - block - before - frames)
    q = F.pad(q, (0, 0, 0, blocks * block - frames)).unflatten(2, (blocks, block))  # [R, H, blocks, block, d]
    k, v = (F.pad(x, padding).unfold(2, span, block).mT for x in (k, v))  # [R, KV, blocks, span, d]
    mask = layout.plan.transpose(1, 2).flatten(0, 1)  # [R * blocks, 1, block, span]
    if bias is not None:
        key = torch.arange(span, device=q.device) - before
        mask = _biased(mask, bias, key - torch.arange(block, device=q.device)[:, None], q.dtype)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=q.shape[1] != k.shape[1])
    return out.unflatten(0, (rows, blocks)).transpose(2, 3).flatten(1, 2)[:, :frames]


def _biased(mask: Tensor, bias: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores to add, `[..., H, queries, keys]`: the bias of that distance, minus infinity where nothing is seen."""
    reach = bias.shape[1] // 2
    added = bias[:, distance.clamp(-reach, reach) + reach].to(dtype)
    return torch.where(mask, added, torch.tensor(-torch.inf, dtype=dtype, device=added.device))
