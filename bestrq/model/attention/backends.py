"""Attention backends based on torch, and the choice of a backend.

A backend maps concatenated queries, keys and values `[R, T, H + 2 * KV, d]` to `[R, T, H, d]`. It rotates queries and
keys by the rotary phase, scales scores by 1 / sqrt(d), then adds the learned bias, if any. Outputs at padding frames
are finite but unused. The table of all backends, with the segment loop of the CPU, is `attention.module.ATTEND`.

'bands' and 'flex' have files of their own, which are imported only if used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bestrq.model.attention.masks import AttentionLayout, BackendMask, Reach
from bestrq.model.positions import add_bias, split_heads


def choose_backend(setting: str, device: torch.device, num_frames: int, reach: Reach, compiled: bool = False) -> str:
    """Choose the backend by `EncoderSettings.backend`, the device, the frames per row and the reach of the mask.

    Args:
        compiled: blocks are compiled on a CPU as well; a loop over the segments of a batch cannot be.
    """
    if device.type == "cpu" and not compiled:
        return "segments"
    # Compiled kernels do not run under a dispatch mode, such as torch's FLOP counter.
    if setting == "flex" and device.type != "cpu" and _get_current_dispatch_mode() is None:
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
        from bestrq.model.attention.bands import make_band_mask

        return make_band_mask(first_key, stop_key, reach)
    if backend == "flex":
        from bestrq.model.attention.flex import make_block_mask

        return make_block_mask(first_key, stop_key)
    return None


# ---- scaled_dot_product_attention


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
