"""Compilation of Conformer blocks by torch.compile: `EncoderSettings.compile`.

Each block is compiled rather than the whole encoder. All blocks of a stage share one compiled function, as weights are
its arguments: compilation takes the time of one block instead of 12 to 24. FSDP2 gathers weights by block, in hooks
around the call of a block, outside the compiled function. A block holds all elementwise operations that are worth
fusing; between blocks there is nothing to fuse.

Order: activation checkpointing inside the compiled function, whose partitioner then chooses what to store by the same
policy; FSDP2 or DDP outside. This is the order of torchtitan (Liang et al., arXiv 2410.06511, section 2.2).

Names in the state dict do not change, and a copy of an encoder runs its own weights. Evaluation runs uncompiled, as its
shapes vary.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bestrq.model.activation_checkpointing import MODES, STORED_OPERATIONS, run_block
from bestrq.model.layout import StageLayout
from bestrq.model.settings import CheckpointingMode

MAX_GRAPHS = 64
"""compiled versions of a block per process: one per stage of the encoder, row length of a curriculum, chunk size of
dynamic chunk training, and state of freezing. More are an error, as each takes up to a minute of compilation"""


def compile_blocks(blocks: Iterable[nn.Module], mode: CheckpointingMode, backend: Any = "inductor") -> None:
    """Let blocks of an encoder run compiled in training, with activation checkpointing by `mode`.

    Fixed shapes are assumed: each new shape compiles again. Compilation happens at the first call.

    Args:
        blocks: each a `ConformerBlock`; before or after `parallelise`.
        backend: of torch.compile, for tests.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing {mode!r}: give one of {', '.join(map(repr, MODES))}")
    # Dynamo would split a block at DDP's buckets, to overlap their reduction with the rest of the backward pass. The
    # graph of a block is small enough for that, and the splitter rejects activation checkpointing and FlexAttention.
    torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        block.compiled = partial(_run_compiled, compiled_block(backend), mode)  # type: ignore[assignment]


@cache
def compiled_block(backend: Any) -> Callable[..., Tensor]:
    """Compile `run_checkpointed`, once per process."""
    return torch.compile(  # type: ignore[call-overload]  # torch's overloads lack the last two
        run_checkpointed, backend=backend, fullgraph=True, dynamic=False, recompile_limit=MAX_GRAPHS,
        isolate_recompiles=True,
    )  # fmt: skip


def _run_compiled(
    compiled: Callable[..., Tensor], mode: CheckpointingMode, block: nn.Module, x: Tensor, layout: StageLayout
) -> Tensor:
    # Compiled code does not run under a dispatch mode, such as torch's FLOP counter.
    if _get_current_dispatch_mode() is not None:
        return run_block(block.compute, mode, x, layout)  # type: ignore[arg-type]
    return compiled(block, mode, x, layout)


def run_checkpointed(block: nn.Module, mode: CheckpointingMode, x: Tensor, layout: StageLayout) -> Tensor:
    """Call `block.compute` with activation checkpointing by `mode`.

    In a compiled function there is no autocast cache to bypass, unlike in `activation_checkpointing.run_block`.
    """
    compute: Callable[..., Tensor] = block.compute  # type: ignore[assignment]
    if mode == "none" or not torch.is_grad_enabled():
        return compute(x, layout)
    if mode == "full":
        return checkpoint(lambda x: compute(x, layout), x, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, STORED_OPERATIONS)
    return checkpoint(lambda x: compute(x, layout), x, use_reentrant=False, context_fn=contexts)
