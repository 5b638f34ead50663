"""Multi-head self-attention within the segments of packed rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.dropout import draw_kept, draw_seed, drop_threshold, keep_scale
from bestrq.model.layout import RowLayout
from bestrq.model.positions import rotate

MAX_WEIGHTS = 1 << 23
"""attention weights (heads x queries x keys) that the CPU holds at once; a longer segment goes in blocks of queries"""


class SelfAttention(nn.Module):
    """Attention of every frame to the frames of its own segment, `[R, T, D] -> [R, T, D]`."""

    def __init__(self, dim: int, num_heads: int, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: RowLayout) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        dropout = self.attention_dropout if self.training else 0.0
        attend = attend_in_segments if layout.attention_mask is None else attend_with_mask
        return self.out(attend(qkv, layout, dropout).flatten(2))


def attend_with_mask(qkv: Tensor, layout: RowLayout, dropout: float) -> Tensor:
    """One call over all rows with the layout's mask, `[R, T, 3, H, d] -> [R, T, H, d]`: for CUDA."""
    q, k, v = qkv.transpose(1, 3).unbind(dim=2)  # [R, H, T, d] each
    if layout.rotary_phase is not None:
        phase = layout.rotary_phase[:, None]
        q, k = rotate(q, phase).to(v.dtype), rotate(k, phase).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, layout.attention_mask, dropout).transpose(1, 2)


def attend_in_segments(qkv: Tensor, layout: RowLayout, dropout: float) -> Tensor:
    """The same by a loop over the segments, `[R, T, 3, H, d] -> [R, T, H, d]`, zero in gaps: for the CPU.

    Nothing is spent on the products of frames that may not attend to each other. Up to some thousand frames the
    explicit products take a third of the time of torch's blockwise kernel, forward and backward (bf16, d 72), and
    unlike that kernel they know dropout.
    """
    phase = layout.rotary_phase
    out = _SegmentAttention.apply(
        qkv.flatten(0, 1), None if phase is None else phase.flatten(0, 1), layout.segments, drop_threshold(dropout)
    )
    return out.unflatten(0, qkv.shape[:2])


def _weights(q: Tensor, k: Tensor, threshold: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Softmax weights `[H, queries, keys]` before dropout, and its mask (None without); pure in its arguments."""
    weights = (q @ k.mT).softmax(dim=-1)
    if threshold == 0:
        return weights, None
    kept = draw_kept(tuple(weights.shape), threshold, seed)
    return weights, kept.to(weights.dtype)


class _SegmentAttention(torch.autograd.Function):
    """Attention by segment: `[N, 3, H, d]`, phases `[N, d / 2]` or None, (start, stop) of each -> `[N, H, d]`.

    A segment that fits into one block keeps its weights for the backward pass. A longer one computes them again, block
    by block, dropout included: its memory stays linear in its length.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, phase: Tensor | None, segments: list[tuple[int, int]], threshold: int) -> Tensor:
        out = qkv.new_zeros(qkv[:, 0].shape)
        ctx.segments, ctx.threshold, ctx.shape = segments, threshold, qkv.shape
        ctx.seeds = draw_seed(len(segments)) if threshold else [0] * len(segments)
        saved: list[Tensor | None] = [phase]
        for (start, stop), seed in zip(segments, ctx.seeds, strict=True):
            q, k, v = _split(qkv[start:stop], None if phase is None else phase[start:stop])
            blocks = _blocks(q)
            for number, block in enumerate(blocks):
                weights, kept = _weights(q[:, block], k, threshold, seed + number * MAX_WEIGHTS)
                dropped = weights if kept is None else weights * kept
                out[start:stop][block] = ((dropped @ v) * keep_scale(threshold)).transpose(0, 1)
            if ctx.needs_input_grad[0]:
                saved += (q, k, v, weights, kept) if len(blocks) == 1 else (q, k, v, None, None)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        threshold: int = ctx.threshold
        phase, *saved = ctx.saved_tensors
        grad_qkv = grads[0].new_zeros(ctx.shape)
        for i, ((start, stop), seed) in enumerate(zip(ctx.segments, ctx.seeds, strict=True)):
            q, k, v, known_weights, known_kept = saved[5 * i : 5 * i + 5]
            grad_out = (grads[0][start:stop] * keep_scale(threshold)).transpose(0, 1).contiguous()
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for number, block in enumerate(_blocks(q)):
                weights, kept = known_weights, known_kept
                if weights is None:
                    weights, kept = _weights(q[:, block], k, threshold, seed + number * MAX_WEIGHTS)
                dropped = weights if kept is None else weights * kept
                grad_v += dropped.mT @ grad_out[:, block]
                grad_weights = grad_out[:, block] @ v.mT
                if kept is not None:
                    grad_weights *= kept
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_q[:, block] = grad_scores @ k
                grad_k += grad_scores.mT @ q[:, block]
            _join(grad_q, grad_k, grad_v, None if phase is None else phase[start:stop], grad_qkv[start:stop])
        return grad_qkv, None, None, None


def _blocks(q: Tensor) -> list[slice]:
    """Queries of `[H, L, d]` in blocks whose weights are at most `MAX_WEIGHTS`."""
    heads, length, _ = q.shape
    size = max(1, MAX_WEIGHTS // (heads * length))
    return [slice(first, first + size) for first in range(0, length, size)]


def _split(qkv: Tensor, phase: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries, scaled by 1 / sqrt(d), turned keys, and values, `[H, L, d]`, of one segment `[L, 3, H, d]`."""
    scale = qkv.shape[-1] ** -0.5
    queries_keys = qkv[:, :2]
    if phase is not None:
        queries_keys = rotate(queries_keys, phase[:, None, None])
    queries_keys = queries_keys.permute(1, 2, 0, 3)
    q = (queries_keys[0] * scale).to(qkv.dtype, memory_format=torch.contiguous_format)
    k = queries_keys[1].to(qkv.dtype, memory_format=torch.contiguous_format)
    return q.contiguous(), k.contiguous(), qkv[:, 2].transpose(0, 1).contiguous()


def _join(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, phase: Tensor | None, grad_qkv: Tensor) -> None:
    """The transpose of `_split`, written into `[L, 3, H, d]`."""
    scale = grad_q.shape[-1] ** -0.5
    queries_keys = torch.stack((grad_q * scale, grad_k)).permute(2, 0, 1, 3)
    if phase is not None:
        queries_keys = rotate(queries_keys, phase[:, None, None].conj())
    grad_qkv[:, :2] = queries_keys
    grad_qkv[:, 2] = grad_v.transpose(0, 1)
