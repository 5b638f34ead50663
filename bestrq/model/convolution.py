"""The convolution module of a Conformer block, over packed rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.layout import ConvolutionLayout, StageLayout
from bestrq.model.norms import MaskedBatchNorm, make_norm


class ConvolutionModule(nn.Module):
    """Gated pointwise, depthwise, norm, SiLU and pointwise, `[R, T, D] -> [R, T / stride, dim_out]`.

    No output sees two segments. Of its own, output t sees t - (K - 1) / 2 to t + (K - 1) / 2, or t - K + 1 to t with
    `causal`. With stride 2, output u stands for frames 2u and 2u + 1 (the latter may be missing at the end): it is
    centred on 2u, or sees 2u - K + 2 to 2u + 1 with `causal`.

    Source: Gulati et al., arXiv 2005.08100, section 2.2; the stride: Burchi and Vielzeuf, arXiv 2109.01163, section
    3.1, where the first pointwise map goes to the new width.

    Args:
        kernel_size: K, odd.
        norm: 'layer_norm', 'rms_norm' or 'batch_norm' (of valid frames: see `MaskedBatchNorm`).
        stride: 1 or 2; 2 needs segments that start at even frames, and rows of an even number.
        dim_out: width from the gate on; D if None.
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
        self.norm = MaskedBatchNorm(dim_out) if norm == "batch_norm" else make_norm(norm, dim_out)
        self.pointwise_out = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor, layout: StageLayout) -> Tensor:
        """`[R, T, D] -> [R, T / stride, dim_out]`, with the layout of the input; gaps mean nothing afterwards."""
        kernel_size = self.depthwise.kernel_size[0]
        ahead = min(self.stride, kernel_size) - 1 if self.causal else kernel_size // 2
        assert self.depthwise.bias is not None
        x = F.glu(self.pointwise_in(x), dim=-1)
        x = convolve_in_segments(x, self.depthwise.weight, self.depthwise.bias, layout.convolution, ahead)
        return self._finish(x[:, :: self.stride], layout.valid[:, :: self.stride])

    def stream(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The next frames of one segment a row, for a causal module of stride 1 in evaluation.

        Args:
            x: `[R, n, D]`, n of 1 or more.
            cache: `[R, K - 1, dim_out]`, what the depthwise convolution saw last: zeros at the start of a segment, then
                what the last call returned.

        Returns:
            The outputs `[R, n, dim_out]` that `forward` would give there, and the cache for the next call.
        """
        assert self.causal and self.stride == 1 and self.depthwise.bias is not None
        seen = torch.cat([cache, F.glu(self.pointwise_in(x), dim=-1)], dim=1)
        weight, bias = self.depthwise.weight.to(seen.dtype), self.depthwise.bias.to(seen.dtype)
        y = self._finish(depthwise(seen, weight, bias, 0), x.new_ones(x.shape[:2], dtype=torch.bool))
        return y, seen[:, x.shape[1] :]

    def _finish(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.norm(x, valid) if isinstance(self.norm, MaskedBatchNorm) else self.norm(x)
        return self.pointwise_out(F.silu(x))


def convolve_in_segments(x: Tensor, weight: Tensor, bias: Tensor, layout: ConvolutionLayout, ahead: int) -> Tensor:
    """Depthwise convolution `[R, T, D] -> [R, T, D]` as if every segment stood alone among zeros; zero in gaps.

    The rows are dense, and a kernel of 31 frames would reach over a gap of one far into the next segment: the segments
    are spread apart by the kernel's reach before, and brought back after.

    Args:
        weight: `[D, 1, K]`, K odd.
        bias: `[D]`.
        layout: with a reach of K - 1 - ahead or more.
        ahead: frames after its own that an output sees, (K - 1) / 2 at most; before its own it sees K - 1 - ahead.
    """
    rows, frames, dim = x.shape
    # What sees more before than after is the output of a symmetric kernel where that stands, so many frames earlier.
    shift = weight.shape[-1] // 2 - ahead
    length = layout.num_spread + shift
    slot = layout.slot + layout.slot // layout.num_spread * shift if shift else layout.slot
    spread = _Move.apply(x.flatten(0, 1), layout.frame, slot + shift, rows * length).unflatten(0, (rows, length))
    convolved = depthwise(spread, weight.to(x.dtype), bias.to(x.dtype), weight.shape[-1] // 2)
    return _Move.apply(convolved.flatten(0, 1), slot, layout.frame, rows * frames).unflatten(0, (rows, frames))


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """Depthwise convolution `[R, P, D] -> [R, P + 2 padding - K + 1, D]` with `[D, 1, K]` and a bias `[D]`.

    On a CPU, a padding of more than (K - 1) / 2 is slow.
    """
    if x.device.type == "cpu":
        if x.dtype == torch.bfloat16 and len(weight) <= 16:
            # oneDNN never returns, from K = 15 on (torch 2.14). Autocast would come back to its bfloat16.
            with torch.autocast("cpu", enabled=False):
                return depthwise(x.float(), weight.float(), bias.float(), padding).to(x.dtype)
        return _ChannelsLastDepthwise.apply(x, weight, bias, padding)
    return F.conv1d(x.mT, weight, bias, padding=padding, groups=len(weight)).mT


class _Move(torch.autograd.Function):
    """Rows `source` of `[n, D]` put at the rows `target` of zeros `[size, D]`; both int64 `[N]`, none twice.

    As nothing is moved twice, the gradient is the move back: no accumulation, so it is the same every time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.size = len(x)
        return x.new_zeros(size, x.shape[1]).index_copy_(0, target, x.index_select(0, source))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (source, target) = grads, ctx.saved_tensors
        moved = grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, source, grad.index_select(0, target))
        return moved, None, None, None


class _ChannelsLastDepthwise(torch.autograd.Function):
    """`depthwise` by oneDNN's channels-last kernels.

    torch's own choices for a one-dimensional depthwise convolution on a CPU take 35 times as long. Seen as an image
    of one line, forward and input gradient are fast; seen as an image of one column, the weights' gradient is (with
    the strides of channels last: any other takes four times as long).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        line = x.mT[:, :, None]
        return F.conv2d(line, weight[:, :, None], bias, padding=(0, padding), groups=len(weight))[:, :, 0].mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        dim = len(weight)
        line = torch.ops.aten.convolution_backward(
            grad.mT[:, :, None], x.mT[:, :, None], weight[:, :, None], None,
            (1, 1), (0, ctx.padding), (1, 1), False, (0, 0), dim, (True, False, False),
        )  # fmt: skip
        column = torch.ops.aten.convolution_backward(
            grad[:, :, None].permute(0, 3, 1, 2), x[:, :, None].permute(0, 3, 1, 2), weight[..., None], (dim,),
            (1, 1), (ctx.padding, 0), (1, 1), False, (0, 0), dim, (False, True, True),
        )  # fmt: skip
        # In the weight's own strides: DDP compares them with its buckets', those of dimensions of size 1 too.
        weight_grad = torch.empty_like(weight).copy_(column[1][..., 0])
        return line[0][:, :, 0].mT, weight_grad, column[2], None
