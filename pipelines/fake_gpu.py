"""A GPU that is not there: fake tensors of device `cuda`, backward pass included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pipelines.cuda_runtime import allow_backward_without_a_gpu
from pipelines.live_bytes import simulated_gpu

aten = torch.ops.aten

Attention = Callable[..., Tensor]


def efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, **_: Any
) -> Tensor:
    """`scaled_dot_product_attention` with a mask on CUDA: an additive mask whose rows are padded to a multiple of 8
    (`convert_boolean_attn_mask`, `pad_bias` in attention.cpp of torch 2.14), then the memory-efficient kernel."""
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, q.new_zeros(()), q.new_full((), -torch.inf))
        missing = -mask.shape[-1] % 8
        mask = F.pad(mask, (0, missing))[..., : mask.shape[-1]] if missing else mask
        mask = mask.expand(len(q), q.shape[1], q.shape[2], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout)[0]


def unmasked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Flash attention without mask and dropout: tensors and kernels of `varlen_attn`, which computes only the pairs of
    frames of a segment and needs no copies, as it reads `[frames, heads, width]` with any stride."""
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def norm_in_input_dtype(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float) -> Tensor:
    """Norm in the dtype of its input with float32 statistics, in place of Apex's: keeps a bfloat16 residual stream."""
    return F.layer_norm(x, shape, weight, bias, eps)


@contextlib.contextmanager
def fake_gpu(
    attention: Attention = efficient_attention, bfloat16_residual: bool = False, mode: FakeTensorMode | None = None
) -> Iterator[FakeTensorMode]:
    """`simulated_gpu` with a backward pass and the choices of torch on an H100: cuDNN for convolutions, fused norms of
    gradients."""
    allow_backward_without_a_gpu()
    cudnn = torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]
    norm = "bestrq.model.norms.fused_layer_norm_affine"
    with contextlib.ExitStack() as stack:
        for target, replacement in (
            ("torch._C._select_conv_backend", lambda *_, **__: cudnn),
            ("torch._C._conv_determine_backend_memory_format", _convolution_format),
            ("torch.utils._foreach_utils._foreach_supported_types", [torch.Tensor, FakeTensor]),
            (norm, norm_in_input_dtype if bfloat16_residual else None),
        ):
            stack.enter_context(mock.patch(target, replacement))
        # The engine's threads of devices are counted at the first backward pass of the process, perhaps a real one.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield stack.enter_context(simulated_gpu(attention, mode))


def _convolution_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """Format of the output of a convolution: channels last if the input has it, as cuDNN does."""
    channels_last = x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if channels_last else torch.contiguous_format
