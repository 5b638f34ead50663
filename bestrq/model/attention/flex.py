"""Attention by compiled FlexAttention, for CUDA (Dong et al., arXiv 2412.05496); forward alone on a CPU.

The block mask is built from the intervals of keys, without a pass over all pairs of frames, so an hour costs memory
linear in its length. Rows are padded to whole blocks: lengths that are not a multiple of the block are where the
backward pass of FlexAttention went wrong before (pytorch issue 153799). Heads are padded to `MIN_HEAD_DIM`; the kernels
themselves fill widths up to a power of two, and take float32, bfloat16 and float16.

What holds of torch 2.14 and must be looked at again with another: fresh closures every batch and layer, over tensors of
the same shape, find the compiled kernel again and are let go of; a learned bias gets its gradient if it is indexed
once; DDP and FSDP2 change nothing; under activation checkpointing the kernel runs a second time, 'selective' or not,
since a compiled kernel is not an operation that the policy sees. tests/model/test_flex.py shows what of this runs on a
CPU.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bestrq.model.attention.sdpa import split_heads

if TYPE_CHECKING:
    from bestrq.model.layout import AttentionLayout

BLOCK = 128
"""frames in a block of the mask, queries and keys"""


MIN_HEAD_DIM = 16
"""the narrowest product of Triton's on NVIDIA; narrower heads are filled up with zeros"""
MAX_KERNELS = 64
"""compiled at most a process: a stage of the encoder and a row length of a curriculum take one each. Behind it torch
would fall back to a version that holds all scores, so it is an error"""


@cache
def compiled_flex_attention(training: bool, backend: Any = "inductor") -> Any:
    """`flex_attention` compiled once a process: in training for fixed shapes, as its rows always have the same.

    Without gradients, the second shape compiles for any: recordings to evaluate are of any length and number.

    Args:
        backend: torch.compile's, for tests.
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
    """The block mask of the intervals of keys, int64 `[R, T]`, over rows padded to whole blocks.

    Neither end of the interval falls along a row, so a block of queries sees the blocks of keys from that of its first
    query's first key to that of its last query's last key, and sees whole those between its last query's first key
    and its first query's last key.
    """
    rows, frames = first_key.shape
    blocks = -(-frames // BLOCK)
    padded = torch.arange(frames, blocks * BLOCK, device=first_key.device).expand(rows, -1)
    first_key = torch.cat((first_key, padded), dim=1)  # what fills the last block sees itself
    stop_key = torch.cat((stop_key, padded + 1), dim=1)
    first, stop = first_key.view(rows, blocks, BLOCK), stop_key.view(rows, blocks, BLOCK)
    some = first[..., 0] // BLOCK, -(-stop[..., -1] // BLOCK)
    whole = -(-first[..., -1] // BLOCK), stop[..., 0] // BLOCK
    block = torch.arange(blocks, device=first_key.device)
    seen, seen_whole = ((block >= lo[..., None]) & (block < hi[..., None]) for lo, hi in (some, whole))
    partly = seen & ~seen_whole

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_key[row, query]) & (key < stop_key[row, query])

    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(seen_whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(blocks * BLOCK,) * 2
    )


def _listed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries sees, int32 `[R, 1, blocks]`, and which, those seen first."""
    count = seen.sum(dim=-1, dtype=torch.int32)
    order = seen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None], order[:, None].contiguous()


def attend_flex(
    qkv: Tensor,
    num_heads: int,
    layout: "AttentionLayout",
    bias: Tensor | None,
    dropout: float,
    attention: Any = None,
) -> Tensor:
    """One call over all rows, `[R, T, H + 2 * KV, d] -> [R, T, H, d]`.

    Args:
        bias: `[H, 2 * D + 1]`, added to the score of query i and key j at `clamp(j - i, -D, D) + D`, or None.
        attention: in place of the compiled kernel, for tests.
    """
    assert isinstance(layout.plan, BlockMask) and dropout == 0.0
    frames, head_dim = qkv.shape[1], qkv.shape[3]
    padding = (0, max(0, MIN_HEAD_DIM - head_dim), 0, -frames % BLOCK)
    q, k, v = split_heads(qkv, num_heads, layout.rotary_phase)
    if any(padding):
        q, k, v = (F.pad(x, padding) for x in (q, k, v))
    score_mod = None
    if bias is not None:
        reach = bias.shape[1] // 2
        table = bias.to(torch.promote_types(bias.dtype, torch.float32)).contiguous()

        # One look into the table: of two, torch 2.14 cannot add up the gradients. They sum in float32, in any order.
        def score_mod(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + table[head, (key - query).clamp(-reach, reach) + reach]

    attention = attention or compiled_flex_attention(torch.is_grad_enabled())
    out = attention(
        q, k, v, score_mod=score_mod, block_mask=layout.plan, scale=head_dim**-0.5, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[:, :, :frames, :head_dim].transpose(1, 2)
