"""Attention backends based on torch, and the choice of a backend.

A backend maps concatenated queries, keys and values `[R, T, H + 2 * KV, d]` to `[R, T, H, d]`. It rotates queries and
keys by the rotary phase, scales scores by 1 / sqrt(d), then adds the learned bias, if any. Outputs at padding frames
are finite but unused. The table of all backends, with the segment loop of the CPU, is `attention.module.ATTEND`.

'dense' and 'bands' call scaled_dot_product_attention. A dense mask costs memory quadratic in the row length. Bands cost
memory and time linear in it: queries in blocks about as wide as the reach of the mask, each with one slice of keys.

'flex' is in `attention.flex`, which is imported only if used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bestrq.model.attention.masks import AttentionLayout, BackendMask, Reach
from bestrq.model.positions import split_heads


def choose_backend(setting: str, device: torch.device, num_frames: int, reach: Reach) -> str:
    """Choose the backend by `EncoderSettings.backend`, the device, the frames per row and the reach of the mask."""
    if device.type == "cpu":
        return "segments"
    # Compiled kernels do not run under a dispatch mode, such as torch's FLOP counter.
    if setting == "flex" and _get_current_dispatch_mode() is None:
        return "flex"
    before, after = reach
    return "dense" if before is None or after is None or 2 * (before + after) >= num_frames else "bands"


def make_backend_mask(
    backend: str, first_key: Tensor, stop_key: Tensor, reach: Reach, single_segment: Tensor | None = None
) -> BackendMask:
    """Build the mask of a backend from the keys of every query, int64 `[R, T]`. All layers of a stage share it.

    Args:
        single_segment: valid frames, bool `[R, T]`, if every row holds at most one segment; else None.
    """
    if backend == "dense":
        if single_segment is not None and reach == (None, None):
            return make_padding_mask(single_segment)
        return make_dense_mask(first_key, stop_key)
    if backend == "bands":
        before, after = reach
        if before is None or after is None:
            raise ValueError(f"backend 'bands' with reach {reach}: give a mask that is bounded on both sides")
        return make_band_mask(first_key, stop_key, before, after)
    if backend == "flex":
        from bestrq.model.attention.flex import make_block_mask

        return make_block_mask(first_key, stop_key)
    return None


# ---- scaled_dot_product_attention


def make_dense_mask(first_key: Tensor, stop_key: Tensor) -> Tensor:
    """Mask of all pairs of frames, bool `[R, 1, T, T]`, from int64 `[R, T]`."""
    key = torch.arange(first_key.shape[1], device=first_key.device)
    return ((key >= first_key[..., None]) & (key < stop_key[..., None]))[:, None]


def make_padding_mask(valid: Tensor) -> Tensor:
    """Mask of keys, bool `[R, 1, 1, T]` from bool `[R, T]`, for rows of one segment without further masking.

    A mask for each query would take 8 GB for an hour. In an empty row all keys are allowed, as a softmax over no keys
    is NaN.
    """
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]


def make_band_mask(first_key: Tensor, stop_key: Tensor, before: int, after: int) -> Tensor:
    """Mask of blocks of queries and their slices of keys, bool `[R, 1, blocks, block, keys]`, from int64 `[R, T]`.

    A slice starts `before` the first query of the block and ends `after` the last one. A block has `before + after`
    queries, at least 64.
    """
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
        mask = _add_bias(mask, bias, frame - frame[:, None], q.dtype)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=grouped).transpose(1, 2)


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
        mask = _add_bias(mask, bias, key - torch.arange(block, device=q.device)[:, None], q.dtype)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=q.shape[1] != k.shape[1])
    return out.unflatten(0, (rows, blocks)).transpose(2, 3).flatten(1, 2)[:, :frames]


def _add_bias(mask: Tensor, bias: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `[..., H, queries, keys]`: the bias at each distance, minus infinity at masked keys."""
    reach = bias.shape[1] // 2
    scores = bias[:, distance.clamp(-reach, reach) + reach].to(dtype)
    return torch.where(mask, scores, torch.tensor(-torch.inf, dtype=dtype, device=scores.device))
