"""Attention by a loop over the segments, for the CPU.

Nothing is spent on the products of frames that may not attend to each other, and memory is linear in the length of a
segment: one that is long, or that a mask narrows, goes in blocks of queries, each beside the keys that any of them
sees. Up to some thousand frames the explicit products take a third of the time of torch's blockwise kernel, forward
and backward (bf16, d 72), and unlike that kernel they know dropout and a learned bias.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bestrq.model.dropout import draw_kept, draw_seed, drop_threshold, keep_scale
from bestrq.model.masks import Mask
from bestrq.model.positions import rotate

if TYPE_CHECKING:
    from bestrq.model.layout import AttentionLayout

MAX_WEIGHTS = 1 << 23
"""attention weights (heads x queries x keys) that are held at once"""
MIN_BLOCK = 64
"""queries in a block of a narrow mask: shorter ones would be all overhead"""

Block = tuple[slice, slice]
"""queries, and the keys that any of them sees, in frames of the segment"""


def attend_in_segments(
    qkv: Tensor, num_heads: int, layout: "AttentionLayout", bias: Tensor | None, dropout: float
) -> Tensor:
    """Attention over `[R, T, H + 2 * KV, d]` -> `[R, T, H, d]`, zero in gaps.

    Args:
        bias: `[H, 2 * D + 1]`, added to the score of query i and key j at `clamp(j - i, -D, D) + D`, or None.
    """
    phase = layout.rotary_phase
    out = _SegmentAttention.apply(
        qkv.flatten(0, 1),
        None if phase is None else phase.flatten(0, 1),
        bias,
        num_heads,
        layout.segments,
        layout.mask,
        drop_threshold(dropout),
    )
    return out.unflatten(0, qkv.shape[:2])


class _SegmentAttention(torch.autograd.Function):
    """Attention by segment: `[N, H + 2 * KV, d]`, phases `[N, d / 2]` or None, (start, stop) of each -> `[N, H, d]`.

    A segment that fits into one block keeps its weights for the backward pass. A longer one computes them again, block
    by block, dropout included.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        phase: Tensor | None,
        bias: Tensor | None,
        num_heads: int,
        segments: list[tuple[int, int]],
        mask: Mask,
        threshold: int,
    ) -> Tensor:
        out = qkv.new_zeros(len(qkv), num_heads, qkv.shape[-1])
        ctx.segments, ctx.mask, ctx.threshold, ctx.shape = segments, mask, threshold, qkv.shape
        ctx.seeds = draw_seed(len(segments)) if threshold else [0] * len(segments)
        saved: list[Tensor | None] = [phase, bias]
        for (start, stop), seed in zip(segments, ctx.seeds, strict=True):
            q, k, v = _split(qkv[start:stop], num_heads, None if phase is None else phase[start:stop])
            blocks = _blocks(mask, stop - start, num_heads)
            for number, block in enumerate(blocks):
                weights, kept = _weights(q, k, bias, mask, block, threshold, seed + number * MAX_WEIGHTS)
                dropped = weights if kept is None else weights * kept
                attended = _grouped(dropped, v) @ v[:, block[1]]
                out[start:stop][block[0]] = (
                    (attended * keep_scale(threshold)).view(q[:, block[0]].shape).transpose(0, 1)
                )
            if any(ctx.needs_input_grad[:3]):
                saved += (q, k, v, weights, kept) if len(blocks) == 1 else (q, k, v, None, None)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        threshold: int = ctx.threshold
        phase, bias, *saved = ctx.saved_tensors
        grad_qkv = grads[0].new_zeros(ctx.shape)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for i, ((start, stop), seed) in enumerate(zip(ctx.segments, ctx.seeds, strict=True)):
            q, k, v, known_weights, known_kept = saved[5 * i : 5 * i + 5]
            grad_out = (grads[0][start:stop] * keep_scale(threshold)).transpose(0, 1).contiguous()
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for number, block in enumerate(_blocks(ctx.mask, stop - start, len(q))):
                weights, kept = known_weights, known_kept
                if weights is None:
                    weights, kept = _weights(q, k, bias, ctx.mask, block, threshold, seed + number * MAX_WEIGHTS)
                queries, keys = block
                dropped = weights if kept is None else weights * kept
                grad_block = _grouped(grad_out[:, queries], v)
                grad_v[:, keys] += _grouped(dropped, v).mT @ grad_block
                grad_weights = (grad_block @ v[:, keys].mT).view(weights.shape)
                if kept is not None:
                    grad_weights *= kept
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grouped = _grouped(grad_scores, k)
                grad_q[:, queries] = (grouped @ k[:, keys]).view(grad_out[:, queries].shape)
                grad_k[:, keys] += grouped.mT @ _grouped(q[:, queries], k)
                if grad_bias is not None:
                    _add_bias_gradient(grad_bias, grad_scores, block)
            _join(grad_q, grad_k, grad_v, None if phase is None else phase[start:stop], grad_qkv[start:stop])
        return grad_qkv, None, grad_bias, None, None, None, None


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """`[H, n, m]` as `[KV, H / KV * n, m]`: the query heads that share keys `[KV, L, d]` stand behind each other."""
    return x if len(x) == len(keys) else x.reshape(len(keys), -1, x.shape[-1])


def _blocks(mask: Mask, length: int, heads: int) -> list[Block]:
    """The queries of a segment in blocks whose weights are at most `MAX_WEIGHTS`, with the keys they see."""
    before, behind = mask.reach
    size = max(1, MAX_WEIGHTS // (heads * length))
    if before is not None and behind is not None:
        # A block of n queries takes n + before + behind keys: half as many queries as that is a fair trade.
        narrow = max(MIN_BLOCK, (before + behind) // 2)
        if 2 * narrow < length:
            size = max(1, min(narrow, MAX_WEIGHTS // (heads * (narrow + before + behind))))
    blocks = []
    for first in range(0, length, size):
        stop = min(first + size, length)
        keys = slice(max(0, mask(first)[0]), min(length, mask(stop - 1)[1]))
        blocks.append((slice(first, stop), keys))
    return blocks


def _weights(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Mask, block: Block, threshold: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """Softmax weights `[H, queries, keys]` before dropout, and its mask (None without); pure in its arguments."""
    queries, keys = block
    scores = _grouped(q[:, queries], k) @ k[:, keys].mT
    scores = scores.view(len(q), queries.stop - queries.start, -1)
    if bias is not None:
        scores += _by_distance(bias, block).to(scores.dtype)
    if mask(queries.stop - 1)[0] > keys.start or mask(queries.start)[1] < keys.stop:  # not all see all of the keys
        key = torch.arange(keys.start, keys.stop)
        first, stop = mask(torch.arange(queries.start, queries.stop))
        scores.masked_fill_((key < first[:, None]) | (key >= stop[:, None]), -torch.inf)
    weights = scores.softmax(dim=-1)
    if threshold == 0:
        return weights, None
    kept = draw_kept(tuple(weights.shape), threshold, seed)
    return weights, kept.to(weights.dtype)


def _distances(bias: Tensor, block: Block) -> Tensor:
    """Columns of the bias for the distances key - query of a block, from the least to the greatest."""
    queries, keys = block
    reach = bias.shape[1] // 2
    return torch.arange(keys.start - queries.stop + 1, keys.stop - queries.start).clamp_(-reach, reach) + reach


def _by_distance(bias: Tensor, block: Block) -> Tensor:
    """The bias of every pair of a block, `[H, queries, keys]`: the last query begins at the least distance."""
    queries, keys = block
    return bias[:, _distances(bias, block)].unfold(1, keys.stop - keys.start, 1).flip(1)


def _add_bias_gradient(grad_bias: Tensor, grad_scores: Tensor, block: Block) -> None:
    """The transpose of `_by_distance`: `[H, queries, keys]` summed along its diagonals."""
    heads, queries, keys = grad_scores.shape
    # With as many zeros behind each query as there are queries, rows shortened by one stand under their diagonals.
    padded = torch.nn.functional.pad(grad_scores.flip(1), (0, queries)).flatten(1)
    skewed = padded[:, : queries * (queries + keys - 1)].view(heads, queries, queries + keys - 1)
    grad_bias.index_add_(1, _distances(grad_bias, block), skewed.sum(dim=1, dtype=grad_bias.dtype))


def _split(qkv: Tensor, num_heads: int, phase: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries `[H, L, d]`, scaled by 1 / sqrt(d), turned keys and values `[KV, L, d]`, of one segment."""
    scale = qkv.shape[-1] ** -0.5
    num_turned = (qkv.shape[1] + num_heads) // 2
    turned = qkv[:, :num_turned]
    if phase is not None:
        turned = rotate(turned, phase[:, None])
    turned = turned.transpose(0, 1)
    q = (turned[:num_heads] * scale).to(qkv.dtype, memory_format=torch.contiguous_format)
    k = turned[num_heads:].to(qkv.dtype, memory_format=torch.contiguous_format)
    return q.contiguous(), k.contiguous(), qkv[:, num_turned:].transpose(0, 1).contiguous()


def _join(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, phase: Tensor | None, grad_qkv: Tensor) -> None:
    """The transpose of `_split`, written into `[L, H + 2 * KV, d]`."""
    scale = grad_q.shape[-1] ** -0.5
    num_turned = len(grad_q) + len(grad_k)
    turned = torch.cat((grad_q * scale, grad_k)).transpose(0, 1)
    if phase is not None:
        turned = rotate(turned, phase[:, None].conj())
    grad_qkv[:, :num_turned] = turned
    grad_qkv[:, num_turned:] = grad_v.transpose(0, 1)
