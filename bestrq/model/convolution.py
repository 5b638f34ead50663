"""The convolution module of a Conformer block, over packed rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.layout import RowLayout
from bestrq.model.norms import make_norm


class ConvolutionModule(nn.Module):
    """Gated pointwise, depthwise, norm, SiLU and pointwise, `[R, T, D] -> [R, T, D]`; no output sees two segments."""

    def __init__(self, dim: int, kernel_size: int, norm: str) -> None:
        super().__init__()
        self.pointwise_in = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, groups=dim)
        self.norm = make_norm(norm, dim)
        self.pointwise_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: RowLayout) -> Tensor:
        x = F.glu(self.pointwise_in(x), dim=-1)
        assert self.depthwise.bias is not None
        x = convolve_in_segments(x, self.depthwise.weight, self.depthwise.bias, layout)
        return self.pointwise_out(F.silu(self.norm(x)))


def convolve_in_segments(x: Tensor, weight: Tensor, bias: Tensor, layout: RowLayout) -> Tensor:
    """Depthwise convolution `[R, T, D] -> [R, T, D]` as if every segment stood alone among zeros; zero in gaps.

    The rows are dense, and a kernel of 31 frames would reach over a gap of one far into the next segment: the segments
    are spread apart by the kernel's reach before, and brought back after.

    Args:
        weight: `[D, 1, K]`, K odd.
        bias: `[D]`.
    """
    rows, frames, dim = x.shape
    spread = _Move.apply(x.flatten(0, 1), layout.frame, layout.slot, rows * layout.num_spread)
    spread = spread.unflatten(0, (rows, layout.num_spread))
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.device.type == "cpu":
        convolved = _ChannelsLastDepthwise.apply(spread, weight, bias)
    else:
        convolved = F.conv1d(spread.mT, weight, bias, padding="same", groups=dim).mT
    back = _Move.apply(convolved.flatten(0, 1), layout.slot, layout.frame, rows * frames)
    return back.unflatten(0, (rows, frames))


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
    """Depthwise convolution of `[R, P, D]` with `[D, 1, K]` and a bias `[D]`, by oneDNN's channels-last kernels.

    torch's own choices for a one-dimensional depthwise convolution on a CPU take 35 times as long. Seen as an image
    of one line, forward and input gradient are fast; seen as an image of one column, the weights' gradient is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        padding = (0, weight.shape[-1] // 2)
        return F.conv2d(x.mT[:, :, None], weight[:, :, None], bias, padding=padding, groups=len(weight))[:, :, 0].mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        dim, _, kernel_size = weight.shape
        reach = kernel_size // 2
        line = torch.ops.aten.convolution_backward(
            grad.mT[:, :, None], x.mT[:, :, None], weight[:, :, None], None,
            (1, 1), (0, reach), (1, 1), False, (0, 0), dim, (True, False, False),
        )  # fmt: skip
        column = torch.ops.aten.convolution_backward(
            grad.mT[..., None], x.mT[..., None], weight[..., None], (dim,),
            (1, 1), (reach, 0), (1, 1), False, (0, 0), dim, (False, True, True),
        )  # fmt: skip
        return line[0][:, :, 0].mT, column[1][..., 0], column[2]
