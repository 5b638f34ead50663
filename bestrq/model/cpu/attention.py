"""Attention by a loop over segments, for the CPU.

No products are computed between segments. Memory is linear in the length of a segment: long segments and narrow masks
are processed in blocks of queries, each with the keys that any of its queries attends to. Up to a few thousand frames,
explicit products take a third of the time of torch's blockwise kernel (forward and backward, bfloat16, d = 72). They
also support dropout and a learned bias, unlike that kernel.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bestrq.model.attention.heads import rotate_complex
from bestrq.model.attention.masks import AttentionLayout, AttentionMask
from bestrq.model.cpu.dropout import draw_kept, draw_seed, drop_threshold, keep_scale

MAX_WEIGHTS = 1 << 23
"""maximum number of attention weights (heads x queries x keys) in memory at once"""
MIN_BLOCK = 64
"""smallest number of queries per block of a narrow mask, to limit the overhead per block"""
ALIGNMENT = 32
"""keys per block are a multiple of this: softmax takes twice as long on rows that do not fill vectors of bfloat16"""
ROTATED_FRAMES = 256
"""frames rotated at once, few enough for the processor's cache"""

Block = tuple[slice, slice]
"""queries and the keys that any of them attends to, in frames of the segment; keys are rounded to `ALIGNMENT`"""


def attend_in_segments(
    qkv: Tensor, num_heads: int, layout: AttentionLayout, bias: Tensor | None, dropout: float
) -> Tensor:
    """Attention `[R, T, H + 2 * KV, d] -> [R, T, H, d]`, zero in gaps.

    Args:
        bias: `[H, 2 * D + 1]`, added to the score of query i and key j at `clamp(j - i, -D, D) + D`, or None.
    """
    phase = None if layout.rotary_phase is None else torch.view_as_complex(layout.rotary_phase.flatten(0, 1))
    out = _SegmentAttention.apply(
        qkv.flatten(0, 1), phase, bias, num_heads, layout.segments, layout.mask, drop_threshold(dropout)
    )
    return out.unflatten(0, qkv.shape[:2])


class _SegmentAttention(torch.autograd.Function):
    """Attention by segment, `[N, H + 2 * KV, d] -> [N, H, d]`, with complex phases `[N, d / 2]` or None.

    The weights of a segment are kept for the backward pass if there are at most `MAX_WEIGHTS`. Otherwise they are
    recomputed block by block, dropout included.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, phase: Tensor | None, bias: Tensor | None, num_heads: int,
        segments: list[tuple[int, int]], mask: AttentionMask, threshold: int,
    ) -> Tensor:  # fmt: skip
        out = _empty_with_zero_gaps((len(qkv), num_heads, qkv.shape[-1]), qkv.dtype, segments)
        ctx.segments, ctx.mask, ctx.threshold, ctx.shape = segments, mask, threshold, qkv.shape
        ctx.seeds = draw_seed(len(segments)) if threshold else [0] * len(segments)
        saved: list[Tensor | None] = [phase, bias]
        for (start, stop), seed in zip(segments, ctx.seeds, strict=True):
            q, k, v = _split(qkv[start:stop], num_heads, None if phase is None else phase[start:stop])
            blocks = _make_blocks(mask, stop - start, num_heads)
            keep = sum(_num_weights(num_heads, block) for block in blocks) <= MAX_WEIGHTS
            block_tensors: list[Tensor | None] = []
            for number, block in enumerate(blocks):
                weights = _attention_weights(q, k, bias, mask, block)
                kept = _draw_kept_weights(weights, threshold, seed + number * MAX_WEIGHTS)
                dropped = weights if kept is None else weights * kept
                attended = (_group_heads(dropped, v) @ v[:, block[1]]).view(q[:, block[0]].shape)
                out[start:stop][block[0]] = (attended * keep_scale(threshold)).transpose(0, 1)
                block_tensors += (weights, kept) if keep else (None, None)
            if any(ctx.needs_input_grad[:3]):
                saved += (q, k, v, *block_tensors)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        threshold: int = ctx.threshold
        phase, bias, *saved = ctx.saved_tensors
        grad_qkv = _empty_with_zero_gaps(ctx.shape, grads[0].dtype, ctx.segments)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        tensors = iter(saved)
        for (start, stop), seed in zip(ctx.segments, ctx.seeds, strict=True):
            q, k, v = next(tensors), next(tensors), next(tensors)
            grad_out = (grads[0][start:stop] * keep_scale(threshold)).transpose(0, 1).contiguous()
            blocks = _make_blocks(ctx.mask, stop - start, len(q))
            grad_q = torch.empty_like(q)
            if len(blocks) > 1:
                grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
            for number, block in enumerate(blocks):
                queries, keys = block
                weights, kept = next(tensors), next(tensors)
                if weights is None:
                    weights = _attention_weights(q, k, bias, ctx.mask, block)
                    kept = _draw_kept_weights(weights, threshold, seed + number * MAX_WEIGHTS)
                dropped = weights if kept is None else weights * kept
                grad_block = _group_heads(grad_out[:, queries], v)
                grad_values = _group_heads(dropped, v).mT @ grad_block
                grad_weights = (grad_block @ v[:, keys].mT).view(weights.shape)
                if kept is not None:
                    grad_weights *= kept
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grouped = _group_heads(grad_scores, k)
                grad_q[:, queries] = (grouped @ k[:, keys]).view(grad_out[:, queries].shape)
                grad_keys = grouped.mT @ _group_heads(q[:, queries], k)
                if len(blocks) > 1:
                    grad_k[:, keys] += grad_keys
                    grad_v[:, keys] += grad_values
                else:
                    grad_k, grad_v = grad_keys, grad_values
                if grad_bias is not None:
                    _add_bias_gradient(grad_bias, grad_scores, block)
            _join(grad_q, grad_k, grad_v, None if phase is None else phase[start:stop], grad_qkv[start:stop])
        return grad_qkv, None, grad_bias, None, None, None, None


def _empty_with_zero_gaps(shape: tuple[int, ...], dtype: torch.dtype, segments: list[tuple[int, int]]) -> Tensor:
    """Tensor `[N, ...]` that is uninitialised inside the segments and zero between them."""
    out = torch.empty(shape, dtype=dtype)
    for (_, stop), (start, _) in pairwise([(0, 0), *sorted(segments), (len(out), len(out))]):
        out[stop:start] = 0
    return out


def _group_heads(x: Tensor, keys: Tensor) -> Tensor:
    """Stack the query heads that share keys `[KV, L, d]`: `[H, n, m] -> [KV, H / KV * n, m]`."""
    return x if len(x) == len(keys) else x.reshape(len(keys), -1, x.shape[-1])


def _make_blocks(mask: AttentionMask, length: int, heads: int) -> list[Block]:
    """Divide a segment into blocks of queries, each with at most `MAX_WEIGHTS` attention weights."""
    before, after = mask.reach
    size = max(1, MAX_WEIGHTS // (heads * _align(length)))
    if before is not None and after is not None:
        # A block of n queries has n + before + after keys. n = half the reach balances overhead and masked products.
        narrow = max(MIN_BLOCK, (before + after) // 2)
        if 2 * narrow < length:
            size = max(1, min(narrow, MAX_WEIGHTS // (heads * (narrow + before + after))))
    blocks = []
    for first in range(0, length, size):
        stop = min(first + size, length)
        first_key, stop_key = max(0, mask(first)[0]), min(length, mask(stop - 1)[1])
        blocks.append((slice(first, stop), slice(first_key // ALIGNMENT * ALIGNMENT, _align(stop_key))))
    return blocks


def _num_weights(heads: int, block: Block) -> int:
    queries, keys = block
    return heads * (queries.stop - queries.start) * (keys.stop - keys.start)


def _align(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _attention_weights(q: Tensor, k: Tensor, bias: Tensor | None, mask: AttentionMask, block: Block) -> Tensor:
    """Softmax weights `[H, queries, keys]` before dropout."""
    queries, keys = block
    scores = _group_heads(q[:, queries], k) @ k[:, keys].mT
    scores = scores.view(len(q), queries.stop - queries.start, -1)
    if bias is not None:
        scores += _bias_of_pairs(bias.to(scores.dtype), block)
    length = q.shape[1]
    if mask(queries.stop - 1)[0] > keys.start or mask(queries.start)[1] < min(keys.stop, length):
        key = torch.arange(keys.start, keys.stop)
        first, stop = mask(torch.arange(queries.start, queries.stop))
        masked = (key < first[:, None]) | (key >= stop.clamp(max=length)[:, None])
        # Added, as masked_fill on the scores is not vectorised.
        scores += torch.zeros(masked.shape, dtype=scores.dtype).masked_fill_(masked, -torch.inf)
    else:
        scores[..., length - keys.start :] = -torch.inf
    return scores.softmax(dim=-1)


def _draw_kept_weights(weights: Tensor, threshold: int, seed: int) -> Tensor | None:
    """Dropout mask of the weights, in their dtype: 1 for kept, 0 for dropped weights. None without dropout."""
    return draw_kept(tuple(weights.shape), threshold, seed).to(weights.dtype) if threshold else None


def _bias_columns(bias: Tensor, block: Block) -> Tensor:
    """Columns of the bias for the distances (key - query) of a block, from the smallest to one above the largest."""
    queries, keys = block
    reach = bias.shape[1] // 2
    return torch.arange(keys.start - queries.stop + 1, keys.stop - queries.start + 1).clamp_(-reach, reach) + reach


def _diagonals(rows: Tensor, num_keys: int) -> Tensor:
    """View `[H, queries, queries + keys]`, one column per distance, as `[H, queries, keys]`, one per key.

    The keys of the last query start at the first column, and those of each earlier query one column further right. In
    the flattened rows, the starts of consecutive queries are therefore one element less than a row apart.
    """
    heads, queries, columns = rows.shape
    return rows.flatten(1)[:, queries - 1 : -1].unflatten(1, (queries, columns - 1))[..., :num_keys]


def _bias_of_pairs(bias: Tensor, block: Block) -> Tensor:
    """Bias of every pair in a block, `[H, queries, keys]`."""
    queries, keys = block
    columns = bias[:, _bias_columns(bias, block)]
    rows = columns[:, None].expand(-1, queries.stop - queries.start, -1).contiguous()
    return _diagonals(rows, keys.stop - keys.start).contiguous()


def _add_bias_gradient(grad_bias: Tensor, grad_scores: Tensor, block: Block) -> None:
    """Gradient of `_bias_of_pairs`: add `[H, queries, keys]`, summed along diagonals, to the gradient of the bias."""
    heads, queries, keys = grad_scores.shape
    rows = grad_scores.new_zeros(heads, queries, queries + keys)
    _diagonals(rows, keys).copy_(grad_scores)
    grad_bias.index_add_(1, _bias_columns(grad_bias, block), rows.sum(dim=1, dtype=grad_bias.dtype))


def _split(qkv: Tensor, num_heads: int, phase: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split one segment into rotated, scaled queries `[H, L, d]`, rotated keys and values `[KV, L', d]`.

    L' is L rounded up to `ALIGNMENT`, with zeros at the end.
    """
    length, heads, head_dim = qkv.shape
    counts = (num_heads, (heads - num_heads) // 2, (heads - num_heads) // 2)
    sizes = (length, _align(length), _align(length))
    q, k, v = (qkv.new_empty(count, size, head_dim) for count, size in zip(counts, sizes, strict=True))
    for frames in _slices(length):
        parts = _rotate_heads(qkv[frames].split(counts, dim=1), None if phase is None else phase[frames])
        for target, part in zip((q, k, v), parts, strict=True):
            target[:, frames] = part.transpose(0, 1)
    k[:, length:] = v[:, length:] = 0
    return q, k, v


def _join(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, phase: Tensor | None, grad_qkv: Tensor) -> None:
    """Gradient of `_split`, written into `[L, H + 2 * KV, d]`."""
    grads = grad_q, grad_k, grad_v
    for frames in _slices(len(grad_qkv)):
        parts = tuple(grad[:, frames].transpose(0, 1) for grad in grads)
        targets = grad_qkv[frames].split([len(grad) for grad in grads], dim=1)
        rotated = _rotate_heads(parts, None if phase is None else phase[frames].conj())
        for target, part in zip(targets, rotated, strict=True):
            target.copy_(part)


def _rotate_heads(parts: tuple[Tensor, ...], phase: Tensor | None) -> tuple[Tensor, ...]:
    """Rotate queries and keys `[n, heads, d]` by phases `[n, d / 2]`, scale queries by 1 / sqrt(d), keep values."""
    q, k, v = parts
    scale = q.shape[-1] ** -0.5
    if phase is None:
        return q * scale, k, v
    return _rotate(q, phase[:, None] * scale), _rotate(k, phase[:, None]), v


def _rotate(x: Tensor, phase: Tensor) -> Tensor:
    return rotate_complex(x.to(phase.real.dtype).unflatten(-1, (-1, 2)), phase)


def _slices(length: int) -> list[slice]:
    return [slice(first, min(first + ROTATED_FRAMES, length)) for first in range(0, length, ROTATED_FRAMES)]
