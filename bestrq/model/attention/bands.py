"""Attention of bounded masks by bands: queries in blocks about as wide as the reach of the mask, each with one slice of
keys. Memory and time are linear in the row length. Imported only if used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.model.attention.heads import add_bias, split_heads
from bestrq.model.attention.masks import AttentionLayout, Reach


def make_band_mask(first_key: Tensor, stop_key: Tensor, reach: Reach) -> Tensor:
    """Mask of blocks of queries and their slices of keys, bool `[R, 1, blocks, block, keys]`, from int64 `[R, T]`.

    A slice starts `before` the first query of the block and ends `after` the last one. A block has `before + after`
    queries, at least 64. Raises ValueError for a mask that is unbounded on a side.
    """
    before, after = reach
    if before is None or after is None:
        raise ValueError(f"backend 'bands' with reach {reach}: give a mask that is bounded on both sides")
    rows, frames = first_key.shape
    block = min(max(before + after, 64), frames)
    blocks = -(-frames // block)
    padding = (0, blocks * block - frames)
    query = torch.arange(blocks * block, device=first_key.device).view(blocks, block, 1)
    key = torch.arange(blocks, device=first_key.device)[:, None, None] * block - before
    key = key + torch.arange(before + block + after, device=first_key.device)
    # Frames that fill the last block attend to themselves, as a softmax over no keys is NaN.
    first = F.pad(first_key, padding).view(rows, blocks, block, 1)
    stop = F.pad(stop_key, padding).view(rows, blocks, block, 1)
    allowed = (key >= first) & (key < stop) | ((query >= frames) & (key == query))
    return allowed[:, None]


def attend_bands(qkv: Tensor, num_heads: int, layout: AttentionLayout, bias: Tensor | None, dropout: float) -> Tensor:
    """Like `attend_dense`, with blocks of queries and their slices of keys in the batch dimension."""
    assert isinstance(layout.backend_mask, Tensor)
    rows, _, blocks, block, span = layout.backend_mask.shape
    q, k, v = split_heads(qkv, num_heads, layout.rotary_phase)
    frames = q.shape[2]
    before, _ = layout.mask.reach
    assert before is not None
    padding = (0, 0, before, blocks * block + span - block - before - frames)
    q = F.pad(q, (0, 0, 0, blocks * block - frames)).unflatten(2, (blocks, block))  # [R, H, blocks, block, d]
    k, v = (F.pad(x, padding).unfold(2, span, block).mT for x in (k, v))  # [R, KV, blocks, span, d]
    mask = layout.backend_mask.transpose(1, 2).flatten(0, 1)  # [R * blocks, 1, block, span]
    if bias is not None:
        key = torch.arange(span, device=q.device) - before
        mask = add_bias(mask, bias, key - torch.arange(block, device=q.device)[:, None], q.dtype)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=q.shape[1] != k.shape[1])
    return out.unflatten(0, (rows, blocks)).transpose(2, 3).flatten(1, 2)[:, :frames]
