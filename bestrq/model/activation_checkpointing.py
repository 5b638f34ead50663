"""Activation checkpointing: a block stores less for the backward pass and recomputes the rest there.

Sources: Chen et al., arXiv 1604.06174; the selective mode: Korthikanti et al., arXiv 2205.05198. docs/memory.md lists
memory and time of each mode.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.nn.attention import varlen  # noqa: F401 - defines `torch_attn._varlen_attn`
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bestrq.model.settings import CheckpointingMode

MODES: tuple[CheckpointingMode, ...] = ("none", "selective", "full")
"""'none' stores all activations, 'selective' the outputs of `STORED_OPERATIONS`, 'full' only the input of a block"""

_aten = torch.ops.aten
STORED_OPERATIONS: list[Any] = [
    # Products with weights. Not bmm: on the CPU its outputs are attention weights, quadratic in the length.
    _aten.mm.default,
    _aten.addmm.default,
    _aten.convolution.default,
    # Attention in one operation, with an output linear in the length.
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    flex_attention,
    torch.ops.torch_attn._varlen_attn.default,
]
"""operations whose outputs 'selective' stores: nearly all FLOPs of a block, but few of its bytes"""


def run_block(block: nn.Module, mode: str, x: Tensor, *args: Any) -> Tensor:
    """Call `block(x, *args)` with activation checkpointing by `mode`. Gradients are bit-identical in all modes.

    Supports blocks sharded by FSDP2 and blocks inside DDP. The recomputation restores the random generators, so that it
    draws the same dropout. A module with running statistics, such as batch norm, would count each batch twice.

    Args:
        mode: one of `MODES`; ignored if gradients are disabled.
        x: input of the block, on the compute device.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing {mode!r}: give one of {', '.join(map(repr, MODES))}")
    compiled = getattr(block, "compiled", None) is not None  # has the mode inside its compiled function
    if mode == "none" or compiled or not torch.is_grad_enabled():
        return block(x, *args)
    if mode == "full":
        return checkpoint(_call_uncached, block, x, *args, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, STORED_OPERATIONS)
    return checkpoint(_call_uncached, block, x, *args, use_reentrant=False, context_fn=contexts)


def _call_uncached(block: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """Call the block without autocast's cache of cast weights.

    The cache would keep all cast weights until the end of the forward pass. It would also be filled in the forward pass
    and empty in the recomputation, which would then run a different sequence of operations.
    """
    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, enabled, cache_enabled=False):
        return block(x, *args)
