"""FlexAttention backend (Dong et al., arXiv 2412.05496), compiled by torch.

Its block mask is derived from the intervals of keys, not from all pairs of frames, so its memory is linear in the row
length. Imported only if used.

Properties of torch 2.14 to check again with another version: closures created per batch and layer, over tensors of
the same shape, reuse the compiled kernel and are freed; a learned bias gets its gradient if it is indexed once; DDP
and FSDP2 change nothing; activation checkpointing runs the kernel twice, 'selective' too, as its policy does not
apply to compiled kernels. tests/model/test_flex.py covers the properties that can be tested on a CPU.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bestrq.model.attention.heads import split_heads
from bestrq.model.attention.masks import AttentionLayout

BLOCK = 128
"""frames per block of a FlexAttention mask, for queries and keys. Rows are padded to full blocks: with other lengths
the backward pass of FlexAttention has been wrong (pytorch issue 153799)"""
MIN_HEAD_DIM = 16
"""smallest head width of FlexAttention's Triton kernels on NVIDIA. Narrower heads are padded with zeros; the kernels
pad wider ones to a power of two. They support float32, bfloat16 and float16"""
MAX_KERNELS = 64
"""compiled FlexAttention kernels per process, one per encoder stage and row length of a curriculum. Beyond the limit
torch would fall back to a version that stores all scores, so `compiled_flex_attention` raises an error"""


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

    if attention is None and torch.compiler.is_compiling():  # part of the graph of a compiled block
        attention = flex_attention
    attention = attention or compiled_flex_attention(torch.is_grad_enabled())
    mask, grouped = layout.backend_mask, q.shape[1] != k.shape[1]
    out = attention(q, k, v, score_mod=score_mod, block_mask=mask, scale=head_dim**-0.5, enable_gqa=grouped)
    return out[:, :, :frames, :head_dim].transpose(1, 2)
