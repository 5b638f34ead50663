"""Activation checkpointing: a block keeps less for the backward pass and computes the rest a second time there.

Source: Chen et al., Training deep nets with sublinear memory cost, arXiv 1604.06174; the selective kind after
Korthikanti et al., Reducing activation recomputation in large transformer models, arXiv 2205.05198. What each mode
keeps, in bytes, and what it costs, in time, stands in docs/memory.md.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")
"""none keeps all; selective the outputs of `KEPT`, and computes the elementwise rest again; full a block's input"""

_aten = torch.ops.aten
KEPT: list[Any] = [
    # Products with weights. Not bmm: by it the CPU makes attention weights, which grow with the square of the length.
    _aten.mm.default,
    _aten.addmm.default,
    _aten.convolution.default,
    # Attention in one operation, whose output is linear in the length.
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    flex_attention,
]
"""operations whose outputs 'selective' keeps: nearly all of a block's arithmetic, and few of its bytes"""


def run_block(block: nn.Module, mode: str, x: Tensor, *args: Any) -> Tensor:
    """`block(x, *args)`, with what `mode` says kept for the backward pass; the gradients are the same, to the bit.

    Works around a block that FSDP2 shards, and inside DDP. The generators are set back for the second computation, so
    it draws the same dropout. But a module with a memory of its batches (batch norm) would see each batch twice.
    Without gradients there is nothing to keep, and `mode` says nothing.

    Args:
        mode: one of `MODES`.
        x: the block's input; its device is the one that counts. The other arguments may be anything.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing {mode!r}: give one of {', '.join(map(repr, MODES))}")
    if mode == "none" or not torch.is_grad_enabled():
        return block(x, *args)
    if mode == "full":
        return checkpoint(_call, block, x, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, KEPT)
    return checkpoint(_call, block, x, *args, use_reentrant=False, context_fn=contexts)


def _call(block: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """The block without autocast's cache of cast weights.

    The cache would hold all of them to the end of the forward pass, for nothing. And it would be full in one of the two
    computations and empty in the other, which would then not be the same sequence of operations.
    """
    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        return block(x, *args)
