"""Multi-head self-attention within the segments of packed rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.dropout import Dropout
from bestrq.model.layout import RowLayout


class SelfAttention(nn.Module):
    """Attention of every frame to the frames of its own segment, `[R, T, D] -> [R, T, D]`."""

    def __init__(self, dim: int, num_heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: RowLayout) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(dim=2)  # [R, T, H, D / H] each
        if layout.rotary is not None:
            q, k = layout.rotary.turn(q), layout.rotary.turn(k)
        share = self.attention_dropout if self.training else 0.0
        attend = attend_in_segments if layout.attention_mask is None else attend_with_mask
        return self.out(attend(q, k, v, layout, share).flatten(2))


def attend_with_mask(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, dropout: float) -> Tensor:
    """One call over all rows with the layout's mask; `[R, T, H, d]` in and out."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, layout.attention_mask, dropout).transpose(1, 2)


def attend_in_segments(q: Tensor, k: Tensor, v: Tensor, layout: RowLayout, dropout: float) -> Tensor:
    """The same by a loop over the segments, which costs nothing outside them; gaps get zeros."""
    rows, frames = q.shape[:2]
    q, k, v = (t.flatten(0, 1).transpose(0, 1) for t in (q, k, v))  # [H, R * T, d]
    out = q.new_zeros(q.shape)
    for start, stop in layout.segments:
        s = slice(start, stop)
        out[:, s] = F.scaled_dot_product_attention(q[None, :, s], k[None, :, s], v[None, :, s], None, dropout)[0]
    return out.transpose(0, 1).unflatten(0, (rows, frames))
