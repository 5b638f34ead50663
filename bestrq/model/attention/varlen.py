"""Flash attention by segment (`torch.nn.attention.varlen`), for masks that are a window or all of the segment.

It stores no mask and computes no pair of two segments (Dao, FlashAttention-2, arXiv 2307.08691). It supports neither a
bias of the scores, dropout, nor float32. Imported only if used.

Properties of torch 2.14 to check again with another version: with a `window_size`, flash attention is used, and without
one cuDNN's kernel on some GPUs (`_can_use_cudnn`); a side of the window as long as the longest segment is unbounded.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bestrq.model.attention.heads import split_heads
from bestrq.model.attention.masks import AttentionLayout
from common.segments import Segments


def make_boundaries(ordered: Segments) -> Tensor:
    """First frames of all segments and gaps of a batch, then its number of frames, int32 `[R * (2 * S + 1) + 1]`.

    Frames are counted over the flattened rows `[R * T]`. Unused slots and missing gaps are empty, so that the shape
    depends on the batch's shape only.

    Args:
        ordered: slots by their start, unused ones at the end of the row (`layout.order_segments`).
    """
    rows, _ = ordered.start.shape
    end = torch.full((rows, 1), ordered.num_frames, device=ordered.start.device)
    in_row = torch.cat((torch.stack((ordered.start, ordered.start + ordered.length), dim=2).flatten(1), end), dim=1)
    row_start = torch.arange(rows, device=end.device)[:, None] * ordered.num_frames
    return torch.cat((row_start[0], (in_row + row_start).flatten())).int()


def attend_varlen(qkv: Tensor, num_heads: int, layout: AttentionLayout, bias: Tensor | None, dropout: float) -> Tensor:
    """Like `attend_dense`, without bias and dropout, in bfloat16 or float16 on CUDA.

    The frames of a gap attend to each other, where other backends let each attend to itself; both are unused.
    """
    assert isinstance(layout.backend_mask, Tensor) and bias is None and dropout == 0.0
    rows, frames, _, _ = qkv.shape
    # The longest segment is not known without waiting for the device; no segment is longer than a row.
    before, after = (frames if side is None else side for side in layout.mask.reach)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in split_heads(qkv, num_heads, layout.rotary_phase))
    boundaries, grouped = layout.backend_mask, q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, boundaries, boundaries, frames, frames, window_size=(before, after), enable_gqa=grouped
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, frames))
