"""Convolution module of a Conformer block, for packed rows of segments."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.cpu.convolution import depthwise_cpu
from bestrq.model.layout import ConvolutionLayout, StageLayout
from bestrq.model.norms import make_norm


class ConvolutionModule(nn.Module):
    """Pointwise with GLU, depthwise, norm, SiLU, pointwise: `[R, T, D] -> [R, T / stride, dim_out]`.

    No output depends on two segments. Output t depends on frames t - (K - 1) / 2 to t + (K - 1) / 2 of its segment, or
    t - K + 1 to t if `causal`. With stride 2, output u represents frames 2u and 2u + 1 (the latter may be missing
    at the end of a segment): its kernel is centred on 2u, or covers 2u - K + 2 to 2u + 1 if `causal`.

    Sources: Gulati et al., arXiv 2005.08100, section 2.2; for the stride, Burchi and Vielzeuf, arXiv 2109.01163,
    section 3.1, whose first pointwise layer changes the width.

    Args:
        kernel_size: K, odd.
        norm: 'layer_norm', 'rms_norm' or 'batch_norm' (over valid frames: see `MaskedBatchNorm`).
        stride: 1 or 2; with 2, segments start at even frames and rows have an even number of frames.
        dim_out: width from the GLU on; D if None.
    """

    def __init__(
        self, dim: int, kernel_size: int, norm: str, causal: bool = False, stride: int = 1, dim_out: int | None = None
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        self.stride = stride
        self.causal = causal
        self.pointwise_in = nn.Linear(dim, 2 * dim_out)
        self.depthwise = nn.Conv1d(dim_out, dim_out, kernel_size, groups=dim_out)
        self.norm_is_masked = norm == "batch_norm"
        self.norm = make_norm(norm, dim_out)
        self.pointwise_out = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor, layout: StageLayout) -> Tensor:
        """Convolve `[R, T, D]`. Outputs at padding frames are unused."""
        kernel_size = self.depthwise.kernel_size[0]
        ahead = min(self.stride, kernel_size) - 1 if self.causal else kernel_size // 2
        assert self.depthwise.bias is not None
        x = F.glu(self.pointwise_in(x), dim=-1)
        x = convolve_in_segments(x, self.depthwise.weight, self.depthwise.bias, layout.convolution, ahead)
        return self.finish(x[:, :: self.stride], layout.valid[:, :: self.stride])

    def finish(self, x: Tensor, valid: Tensor) -> Tensor:
        """Apply norm, SiLU and the last pointwise layer to the output of the depthwise convolution."""
        x = self.norm(x, valid) if self.norm_is_masked else self.norm(x)
        return self.pointwise_out(F.silu(x))


def convolve_in_segments(x: Tensor, weight: Tensor, bias: Tensor, layout: ConvolutionLayout, ahead: int) -> Tensor:
    """Depthwise convolution `[R, T, D] -> [R, T, D]` of each segment alone, padded with zeros; zero in gaps.

    Rows are packed densely: a kernel of 31 frames would reach across a gap of one frame far into the next segment.
    Therefore segments are moved apart by the reach of the kernel, convolved, and moved back.

    Args:
        weight: `[D, 1, K]`, K odd.
        bias: `[D]`.
        layout: with a reach of at least K - 1 - ahead.
        ahead: later frames that an output depends on, at most (K - 1) / 2; it depends on K - 1 - ahead earlier ones.
    """
    rows, frames, _ = x.shape
    place, num_places = layout.place, len(layout.frame) // rows
    moved = _Gather.apply(x.flatten(0, 1), layout.frame, layout.occupied, place, layout.valid)
    spread = moved.unflatten(0, (rows, num_places))
    # A kernel that reaches further back than ahead gives the output of a centred kernel `shift` frames earlier.
    shift = weight.shape[-1] // 2 - ahead
    if shift:
        spread = F.pad(spread, (0, 0, shift, 0))
    convolved = depthwise(spread, weight.to(x.dtype), bias.to(x.dtype), weight.shape[-1] // 2)[:, :num_places]
    out = _Gather.apply(convolved.flatten(0, 1), place, layout.valid, layout.frame, layout.occupied)
    return out.unflatten(0, (rows, frames))


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Depthwise convolution `[R, P, D] -> [R, P + 2 * padding - K + 1, D]`; weight `[D, 1, K]`, bias `[D]`."""
    if x.device.type == "cpu":
        return depthwise_cpu(x, weight, bias, padding)
    return F.conv1d(x.mT, weight, bias, padding=padding, groups=len(weight)).mT


class _Gather(torch.autograd.Function):
    """Rows `source` of `[n, D]`, zero where not `used`, bool `[m, 1]`: `[m, D]`.

    `inverse` and `inverse_used` are those of the reverse copy, which is the gradient: deterministic, as no row is used
    twice, and of fixed shapes, which a list of the valid frames is not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, used: Tensor, inverse: Tensor, inverse_used: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, inverse_used)
        return x.index_select(0, source).mul_(used.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (inverse, inverse_used) = grads, ctx.saved_tensors
        return grad.index_select(0, inverse).mul_(inverse_used.to(grad.dtype)), None, None, None, None
