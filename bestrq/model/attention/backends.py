"""Attention backends based on torch, and the choice of a backend.

A backend maps concatenated queries, keys and values `[R, T, H + 2 * KV, d]` to `[R, T, H, d]`. It rotates queries and
keys by the rotary phase, scales scores by 1 / sqrt(d), then adds the learned bias, if any. Outputs at padding frames
are finite but unused. The table of all backends, with the segment loop of the CPU, is `attention.module.ATTEND`.

'dense' and 'bands' call scaled_dot_product_attention. A dense mask costs memory quadratic in the row length. Bands cost
memory and time linear in it: queries in blocks about as wide as the reach of the mask, each with one slice of keys.

'flex' is compiled FlexAttention (Dong et al., arXiv 2412.05496). Its block mask is derived from the intervals of keys,
not from all pairs of frames, so its memory is linear in the row length.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bestrq.model.attention.masks import AttentionMask
from bestrq.model.positions import split_heads

BackendMask = Tensor | BlockMask | None
Reach = tuple[int | None, int | None]

BLOCK = 128
"""frames per block of a FlexAttention mask, for queries and keys. Rows are padded to full blocks: with other lengths
the backward pass of FlexAttention has been wrong (pytorch issue 153799)"""
MIN_HEAD_DIM = 16
"""smallest head width of FlexAttention's Triton kernels on NVIDIA. Narrower heads are padded with zeros; the kernels
pad wider ones to a power of two. They support float32, bfloat16 and float16"""
MAX_KERNELS = 64
"""compiled FlexAttention kernels per process, one per encoder stage and row length of a curriculum. Beyond the limit
torch would fall back to a version that stores all scores, so `compiled_flex_attention` raises an error"""


@dataclass
class AttentionLayout:
    """Keys of every query in a batch, in frames of attention (groups of frames if `group_size` is above 1)."""

    segments: list[tuple[int, int]]
    """(start, stop) of every segment in the flattened frames [R * T], as ints for the loop on the CPU"""
    mask: AttentionMask
    first_key: Tensor
    """int64 [R, T]: first key of every query, as a frame of its row; a padding frame attends to itself"""
    stop_key: Tensor
    """int64 [R, T]: end of the keys, exclusive; neither bound decreases along a row"""
    rotary_phase: Tensor | None
    """complex [R, T, d / 2]: `positions.rotary_phase`, counted from the start of the segment, or None"""
    backend: str
    """key of `attention.module.ATTEND`"""
    backend_mask: BackendMask
    """mask in the format of the backend; None for 'segments'"""


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
    return make_block_mask(first_key, stop_key) if backend == "flex" else None


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


# ---- FlexAttention
#
# Properties of torch 2.14 to check again with another version: closures created per batch and layer, over tensors of
# the same shape, reuse the compiled kernel and are freed; a learned bias gets its gradient if it is indexed once; DDP
# and FSDP2 change nothing; activation checkpointing runs the kernel twice, 'selective' too, as its policy does not
# apply to compiled kernels. tests/model/test_flex.py covers the properties that can be tested on a CPU.


@cache
def compiled_flex_attention(training: bool, backend: Any = "inductor") -> Any:
    """Compile `flex_attention`, once per process.

    Training compiles for fixed shapes, as its rows keep their shape. Without gradients, the second shape triggers
    compilation for arbitrary shapes, as recordings vary in length and number.

    Args:
        backend: of torch.compile, for tests.
    """
    return torch.compile(  # type: ignore[call-overload]  # torch's overloads lack the last two
        flex_attention,
        backend=backend,
        fullgraph=True,
        dynamic=False if training else None,
        recompile_limit=MAX_KERNELS,
        isolate_recompiles=True,
    )


def make_block_mask(first_key: Tensor, stop_key: Tensor) -> BlockMask:
    """Block mask of the intervals of keys, int64 `[R, T]`, over rows padded to full blocks.

    Neither bound of the interval decreases along a row. Therefore a block of queries attends to the blocks of keys from
    the first query's first key to the last query's last key, and fully to those between the last query's first key and
    the first query's last key.
    """
    rows, frames = first_key.shape
    blocks = -(-frames // BLOCK)
    size = blocks * BLOCK
    padding = torch.arange(frames, size, device=first_key.device).expand(rows, -1)
    first_key = torch.cat((first_key, padding), dim=1)  # frames that fill the last block attend to themselves
    stop_key = torch.cat((stop_key, padding + 1), dim=1)
    first, stop = first_key.view(rows, blocks, BLOCK), stop_key.view(rows, blocks, BLOCK)
    any_key = first[..., 0] // BLOCK, -(-stop[..., -1] // BLOCK)
    all_keys = -(-first[..., -1] // BLOCK), stop[..., 0] // BLOCK
    block = torch.arange(blocks, device=first_key.device)
    attended, full = ((block >= lo[..., None]) & (block < hi[..., None]) for lo, hi in (any_key, all_keys))
    partial = attended & ~full

    def is_allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_key[row, query]) & (key < stop_key[row, query])

    return BlockMask.from_kv_blocks(
        *_list_blocks(partial), *_list_blocks(full), BLOCK_SIZE=BLOCK, mask_mod=is_allowed, seq_lengths=(size, size)
    )


def _list_blocks(attended: Tensor) -> tuple[Tensor, Tensor]:
    """Count and indices of the key blocks that each query block attends to, int32 `[R, 1, blocks]` and `[R, 1, ...]`.

    Attended blocks come first among the indices.
    """
    count = attended.sum(dim=-1, dtype=torch.int32)
    order = attended.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None], order[:, None].contiguous()


def attend_flex(
    qkv: Tensor, num_heads: int, layout: AttentionLayout, bias: Tensor | None, dropout: float, attention: Any = None
) -> Tensor:
    """Like `attend_dense`, by FlexAttention; dropout is not supported. On a CPU, forward only.

    Args:
        attention: replacement of the compiled kernel, for tests.
    """
    assert isinstance(layout.backend_mask, BlockMask) and dropout == 0.0
    frames, head_dim = qkv.shape[1], qkv.shape[3]
    padding = (0, max(0, MIN_HEAD_DIM - head_dim), 0, -frames % BLOCK)
    q, k, v = split_heads(qkv, num_heads, layout.rotary_phase)
    if any(padding):
        q, k, v = (F.pad(x, padding) for x in (q, k, v))
    score_mod = None
    if bias is not None:
        reach = bias.shape[1] // 2
        table = bias.to(torch.promote_types(bias.dtype, torch.float32)).contiguous()

        # The table is indexed once, as torch 2.14 cannot add two gradients of it. It is float32, as is its gradient.
        def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + table[head, (key - query).clamp(-reach, reach) + reach]

    attention = attention or compiled_flex_attention(torch.is_grad_enabled())
    mask, grouped = layout.backend_mask, q.shape[1] != k.shape[1]
    out = attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=head_dim**-0.5, enable_gqa=grouped)
    return out[:, :, :frames, :head_dim].transpose(1, 2)
