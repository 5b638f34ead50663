"""Attention by a loop over the segments, for the CPU.

Nothing is spent on the products of frames that may not attend to each other, and memory is linear in the length of a
segment: one that is long, or that a mask narrows, goes in blocks of queries, each beside the keys that any of them
sees. Up to some thousand frames the explicit products take a third of the time of torch's blockwise kernel, forward
and backward (bf16, d 72), and unlike that kernel they know dropout and a learned bias.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bestrq.model.attention.masks import Mask
from bestrq.model.cpu.dropout import draw_kept, draw_seed, drop_threshold, keep_scale
from bestrq.model.positions import rotate

if TYPE_CHECKING:
    from bestrq.model.layout import AttentionLayout

MAX_WEIGHTS = 1 << 23
"""attention weights (heads x queries x keys) that are held at once"""
MIN_BLOCK = 64
"""queries in a block of a narrow mask: shorter ones would be all overhead"""

ALIGNMENT = 32
"""keys: rows of scores that are no multiple of a vector's 32 bfloat16 numbers take twice as long in softmax"""
SLICE = 256
"""frames turned at once: few enough for the processor's cache"""

Block = tuple[slice, slice]
"""queries, and the keys that any of them sees, in frames of the segment; keys are rounded to `ALIGNMENT`"""


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

    A segment with at most `MAX_WEIGHTS` weights keeps them for the backward pass. A longer one computes them again,
    block by block, dropout included.
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
        out = _zero_in_gaps((len(qkv), num_heads, qkv.shape[-1]), qkv.dtype, segments)
        ctx.segments, ctx.mask, ctx.threshold, ctx.shape = segments, mask, threshold, qkv.shape
        ctx.seeds = draw_seed(len(segments)) if threshold else [0] * len(segments)
        saved: list[Tensor | None] = [phase, bias]
        for (start, stop), seed in zip(segments, ctx.seeds, strict=True):
            q, k, v = _split(qkv[start:stop], num_heads, None if phase is None else phase[start:stop])
            blocks = _blocks(mask, stop - start, num_heads)
            keep = sum(_num_weights(num_heads, block) for block in blocks) <= MAX_WEIGHTS
            of_blocks: list[Tensor | None] = []
            for number, block in enumerate(blocks):
                weights = _weights(q, k, bias, mask, block)
                kept = _kept(weights, threshold, seed + number * MAX_WEIGHTS)
                dropped = weights if kept is None else weights * kept
                attended = (_grouped(dropped, v) @ v[:, block[1]]).view(q[:, block[0]].shape)
                out[start:stop][block[0]] = (attended * keep_scale(threshold)).transpose(0, 1)
                of_blocks += (weights, kept) if keep else (None, None)
            if any(ctx.needs_input_grad[:3]):
                saved += (q, k, v, *of_blocks)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        threshold: int = ctx.threshold
        phase, bias, *saved = ctx.saved_tensors
        grad_qkv = _zero_in_gaps(ctx.shape, grads[0].dtype, ctx.segments)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        remembered = iter(saved)
        for (start, stop), seed in zip(ctx.segments, ctx.seeds, strict=True):
            q, k, v = next(remembered), next(remembered), next(remembered)
            grad_out = (grads[0][start:stop] * keep_scale(threshold)).transpose(0, 1).contiguous()
            blocks = _blocks(ctx.mask, stop - start, len(q))
            grad_q = torch.empty_like(q)
            if len(blocks) > 1:
                grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
            for number, block in enumerate(blocks):
                queries, keys = block
                weights, kept = next(remembered), next(remembered)
                if weights is None:
                    weights = _weights(q, k, bias, ctx.mask, block)
                    kept = _kept(weights, threshold, seed + number * MAX_WEIGHTS)
                dropped = weights if kept is None else weights * kept
                grad_block = _grouped(grad_out[:, queries], v)
                grad_values = _grouped(dropped, v).mT @ grad_block
                grad_weights = (grad_block @ v[:, keys].mT).view(weights.shape)
                if kept is not None:
                    grad_weights *= kept
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grouped = _grouped(grad_scores, k)
                grad_q[:, queries] = (grouped @ k[:, keys]).view(grad_out[:, queries].shape)
                grad_keys = grouped.mT @ _grouped(q[:, queries], k)
                if len(blocks) > 1:
                    grad_k[:, keys] += grad_keys
                    grad_v[:, keys] += grad_values
                else:
                    grad_k, grad_v = grad_keys, grad_values
                if grad_bias is not None:
                    _add_bias_gradient(grad_bias, grad_scores, block)
            _join(grad_q, grad_k, grad_v, None if phase is None else phase[start:stop], grad_qkv[start:stop])
        return grad_qkv, None, grad_bias, None, None, None, None


def _zero_in_gaps(shape: tuple[int, ...], dtype: torch.dtype, segments: list[tuple[int, int]]) -> Tensor:
    """Room `[N, ...]` for what the segments will fill, with zeros between them."""
    out = torch.empty(shape, dtype=dtype)
    for (_, stop), (start, _) in pairwise([(0, 0), *sorted(segments), (len(out), len(out))]):
        out[stop:start] = 0
    return out


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """`[H, n, m]` as `[KV, H / KV * n, m]`: the query heads that share keys `[KV, L, d]` stand behind each other."""
    return x if len(x) == len(keys) else x.reshape(len(keys), -1, x.shape[-1])


def _blocks(mask: Mask, length: int, heads: int) -> list[Block]:
    """The queries of a segment in blocks whose weights are at most `MAX_WEIGHTS`, with the keys they see."""
    before, behind = mask.reach
    size = max(1, MAX_WEIGHTS // (heads * _aligned(length)))
    if before is not None and behind is not None:
        # A block of n queries takes n + before + behind keys: half as many queries as that is a fair trade.
        narrow = max(MIN_BLOCK, (before + behind) // 2)
        if 2 * narrow < length:
            size = max(1, min(narrow, MAX_WEIGHTS // (heads * (narrow + before + behind))))
    blocks = []
    for first in range(0, length, size):
        stop = min(first + size, length)
        first_key, stop_key = max(0, mask(first)[0]), min(length, mask(stop - 1)[1])
        blocks.append((slice(first, stop), slice(first_key // ALIGNMENT * ALIGNMENT, _aligned(stop_key))))
    return blocks


def _num_weights(heads: int, block: Block) -> int:
    queries, keys = block
    return heads * (queries.stop - queries.start) * (keys.stop - keys.start)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, mask: Mask, block: Block) -> Tensor:
    """Softmax weights `[H, queries, keys]` before dropout."""
    queries, keys = block
    scores = _grouped(q[:, queries], k) @ k[:, keys].mT
    scores = scores.view(len(q), queries.stop - queries.start, -1)
    if bias is not None:
        scores += _by_distance(bias.to(scores.dtype), block)
    length = q.shape[1]
    if mask(queries.stop - 1)[0] > keys.start or mask(queries.start)[1] < min(keys.stop, length):
        key = torch.arange(keys.start, keys.stop)
        first, stop = mask(torch.arange(queries.start, queries.stop))
        unseen = (key < first[:, None]) | (key >= stop.clamp(max=length)[:, None])
        # Added: the kernel that fills where a mask says so is not vectorised.
        scores += torch.zeros(unseen.shape, dtype=scores.dtype).masked_fill_(unseen, -torch.inf)
    else:
        scores[..., length - keys.start :] = -torch.inf
    return scores.softmax(dim=-1)


def _kept(weights: Tensor, threshold: int, seed: int) -> Tensor | None:
    """Which weights dropout keeps, in their type; the same for the same seed. None without dropout."""
    return draw_kept(tuple(weights.shape), threshold, seed).to(weights.dtype) if threshold else None


def _distances(bias: Tensor, block: Block) -> Tensor:
    """Columns of the bias for the distances key - query of a block, from the least to one above the greatest."""
    queries, keys = block
    reach = bias.shape[1] // 2
    return torch.arange(keys.start - queries.stop + 1, keys.stop - queries.start + 1).clamp_(-reach, reach) + reach


def _diagonals(rows: Tensor, num_keys: int) -> Tensor:
    """Of `[H, queries, queries + keys]`, a column a distance, a view `[H, queries, keys]`: of each query its keys.

    The last query begins at the least distance, each before it a column further: in rows that lie behind each other,
    always one place less than a row after the query before.
    """
    heads, queries, columns = rows.shape
    return rows.flatten(1)[:, queries - 1 : -1].unflatten(1, (queries, columns - 1))[..., :num_keys]


def _by_distance(bias: Tensor, block: Block) -> Tensor:
    """The bias of every pair of a block, `[H, queries, keys]`."""
    queries, keys = block
    columns = bias[:, _distances(bias, block)]
    rows = columns[:, None].expand(-1, queries.stop - queries.start, -1).contiguous()
    return _diagonals(rows, keys.stop - keys.start).contiguous()


def _add_bias_gradient(grad_bias: Tensor, grad_scores: Tensor, block: Block) -> None:
    """The transpose of `_by_distance`: `[H, queries, keys]` summed along its diagonals."""
    heads, queries, keys = grad_scores.shape
    rows = grad_scores.new_zeros(heads, queries, queries + keys)
    _diagonals(rows, keys).copy_(grad_scores)
    grad_bias.index_add_(1, _distances(grad_bias, block), rows.sum(dim=1, dtype=grad_bias.dtype))


def _split(qkv: Tensor, num_heads: int, phase: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries `[H, L, d]`, scaled by 1 / sqrt(d), turned keys and values `[KV, L', d]`, of one segment.

    L' is L aligned, with zeros behind.
    """
    length, heads, head_dim = qkv.shape
    counts = (num_heads, (heads - num_heads) // 2, (heads - num_heads) // 2)
    q, k, v = (
        qkv.new_empty(n, size, head_dim) for n, size in zip(counts, (length, *[_aligned(length)] * 2), strict=True)
    )
    for frames in _slices(length):
        parts = _turn(qkv[frames].split(counts, dim=1), None if phase is None else phase[frames])
        for room, part in zip((q, k, v), parts, strict=True):
            room[:, frames] = part.transpose(0, 1)
    k[:, length:] = v[:, length:] = 0
    return q, k, v


def _join(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, phase: Tensor | None, grad_qkv: Tensor) -> None:
    """The transpose of `_split`, written into `[L, H + 2 * KV, d]`."""
    grads = grad_q, grad_k, grad_v
    for frames in _slices(len(grad_qkv)):
        parts = tuple(grad[:, frames].transpose(0, 1) for grad in grads)
        rooms = grad_qkv[frames].split([len(grad) for grad in grads], dim=1)
        for room, part in zip(rooms, _turn(parts, None if phase is None else phase[frames].conj()), strict=True):
            room.copy_(part)


def _turn(parts: tuple[Tensor, ...], phase: Tensor | None) -> tuple[Tensor, ...]:
    """Queries, keys and values `[n, heads, d]`: the first two turned by `[n, d / 2]`, the first scaled as well."""
    q, k, v = parts
    scale = q.shape[-1] ** -0.5
    if phase is None:
        return q * scale, k, v
    return rotate(q, phase[:, None] * scale), rotate(k, phase[:, None]), v


def _slices(length: int) -> list[slice]:
    return [slice(first, min(first + SLICE, length)) for first in range(0, length, SLICE)]
