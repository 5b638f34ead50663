"""Depthwise convolutions for the CPU, whose gradients use the fast kernels of oneDNN."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_cpu(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
    """`convolution.depthwise` for a CPU. A padding above (K - 1) / 2 is slow."""
    if x.dtype == torch.bfloat16 and len(weight) <= 16:
        # oneDNN hangs for K >= 15 (torch 2.14). Autocast is off, as it would cast back to bfloat16.
        with torch.autocast("cpu", enabled=False):
            return _Depthwise.apply(x.float(), weight.float(), bias.float(), padding).to(x.dtype)
    return _Depthwise.apply(x, weight, bias, padding)


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution by oneDNN's channels-last kernels.

    torch's default for a one-dimensional depthwise convolution on a CPU takes 35 times as long. The forward pass and
    the input gradient are fast for an image of one line, the weight gradient for an image of one column (with
    channels-last strides; other strides take four times as long).
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
        # With the strides of the weight: DDP compares strides with its buckets, even for dimensions of size 1.
        weight_grad = torch.empty_like(weight).copy_(column[1][..., 0])
        return line[0][:, :, 0].mT, weight_grad, column[2], None


def convolve_stride_2(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`subsampling.halve_depthwise` by torch's convolution, on any device."""
    padding = (1 - x.shape[1] % 2, 1)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2, padding=padding, groups=len(weight))
    return out.permute(0, 2, 3, 1)


class HalveDepthwise(torch.autograd.Function):
    """`convolve_stride_2` with a fast input gradient.

    oneDNN's input gradient with stride 2 takes 8 times as long as two convolutions of stride 1: one with the middle
    line of the kernel, for the input frames on which one output depends, and one with the outer lines, for the frames
    in between, on which two outputs depend. The output gradient is spread over the mel bins, with zeros in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return convolve_stride_2(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        channels, even = len(weight), 1 - x.shape[1] % 2
        _, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
            grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, (channels,),
            (2, 2), (even, 1), (1, 1), False, (0, 0), channels, (False, True, True),
        )  # fmt: skip
        spaced = grad.new_zeros(*grad.shape[:2], x.shape[2], channels)
        spaced[:, :, ::2] = grad
        image, flipped = spaced.permute(0, 3, 1, 2), weight.flip(2, 3)
        middle, outer = flipped[:, :, 1:2].contiguous(), flipped[:, :, ::2].contiguous()
        x_grad = torch.empty_like(x)
        x_grad[:, 1 - even :: 2] = F.conv2d(image, middle, padding=(0, 1), groups=channels).permute(0, 2, 3, 1)
        x_grad[:, even::2] = F.conv2d(image, outer, padding=(1, 1), groups=channels).permute(0, 2, 3, 1)[:, even:]
        return x_grad, weight_grad, bias_grad
