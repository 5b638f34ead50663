"""Operators that torch has on CUDA only, in plain operators of the CPU."""

from typing import Any

import torch
import torchaudio  # noqa: F401 - registers its operators
from torch import Tensor

aten = torch.ops.aten


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` by its definition, with the check of dtypes of the fused kernels."""
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"Expected attn_mask dtype to be bool or {query.dtype}, but got {attn_mask.dtype}")
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"Expected one dtype, but got {query.dtype}, {key.dtype} and {value.dtype}")
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


def lstm_cell(
    input_gates: Tensor, hidden_gates: Tensor, cell: Tensor, input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`_thnn_fused_lstm_cell`: hidden state, cell state, and activated gates for the backward pass."""
    gates = input_gates + hidden_gates
    if input_bias is not None and hidden_bias is not None:
        gates = gates + input_bias + hidden_bias
    i, f, c, o = gates.chunk(4, dim=1)
    i, f, c, o = i.sigmoid(), f.sigmoid(), c.tanh(), o.sigmoid()
    new_cell = f * cell + i * c
    return o * new_cell.tanh(), new_cell, torch.cat((i, f, c, o), dim=1)


def lstm_cell_backward(
    grad_hidden: Tensor | None, grad_cell: Tensor | None, cell: Tensor, new_cell: Tensor, gates: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_thnn_fused_lstm_cell_backward_impl`: gradients of the gates, the old cell state and the bias."""
    i, f, c, o = gates.chunk(4, dim=1)
    grad_hidden = torch.zeros_like(cell) if grad_hidden is None else grad_hidden
    squashed = new_cell.tanh()
    total = grad_hidden * o * (1 - squashed * squashed)
    if grad_cell is not None:
        total = total + grad_cell
    of_gates = (total * c * i * (1 - i), total * cell * f * (1 - f), total * i * (1 - c * c),
                grad_hidden * squashed * o * (1 - o))  # fmt: skip
    grad_gates = torch.cat(of_gates, dim=1)
    return grad_gates, total * f, grad_gates.sum(dim=0) if has_bias else None


def rnnt_loss(logits: Tensor, targets: Tensor, num_frames: Tensor, num_labels: Tensor, *more: Any) -> Any:
    """torchaudio's `rnnt_loss_forward`: its CUDA kernel returns early for segments of one frame or without labels, and
    leaves their costs and gradients as allocated; here they are NaN."""
    costs, gradients = torch.ops.torchaudio.rnnt_loss_forward.default(logits, targets, num_frames, num_labels, *more)
    unwritten = (num_frames < 2) | (num_labels < 1)
    return costs.masked_fill(unwritten, float("nan")), gradients.masked_fill(
        unwritten[:, None, None, None], float("nan")
    )


def rms_norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], inverse_rms: Tensor, weight: Tensor | None, wanted: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """`_fused_rms_norm_backward`: gradients of the input and the weight."""
    axes = tuple(range(-len(shape), 0))
    wide = torch.promote_types(x.dtype, torch.float32)
    normalised = x.to(wide) * inverse_rms
    scaled = grad.to(wide) if weight is None else grad.to(wide) * weight
    of_input = (scaled - normalised * (scaled * normalised).mean(axes, keepdim=True)) * inverse_rms
    of_weight = (grad * normalised).sum(tuple(range(x.dim() - len(shape))))
    return of_input.to(x.dtype), of_weight.to(weight.dtype) if weight is not None else None


def no_cudnn(*args: Any, **kwargs: Any) -> bool:
    """`_use_cudnn_ctc_loss`: False, as cuDNN takes int32 labels of one dimension only."""
    return False


KERNELS: dict[Any, Any] = {
    aten._thnn_fused_lstm_cell: lstm_cell,
    aten._thnn_fused_lstm_cell_backward_impl: lstm_cell_backward,
    aten._fused_rms_norm_backward: rms_norm_backward,
    aten._use_cudnn_ctc_loss: no_cudnn,
    torch.ops.torchaudio.rnnt_loss_forward: rnnt_loss,
    aten._use_miopen_ctc_loss: no_cudnn,
    aten._conj: aten._conj_physical.default,  # the conjugate bit of the CPU tensor would be that of the wrapper too
    aten._neg_view: aten.neg.default,
}
"""operator on the device -> function on the CPU tensors"""
