"""From mel frames to encoder frames: three ways to make one of 2, 4 or 8.

Rows are packed (see `RowLayout`): what a module makes of the frames behind a segment, its bias if nothing else, must
not reach the next convolution, so all of them see zeros in the gaps, each at its own resolution: after k halvings a
frame exists where the first of its 2^k mel frames does, as segments start at multiples of the factor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.layout import RowLayout
from bestrq.model.settings import EncoderSettings


def make_subsampling(settings: EncoderSettings) -> nn.Module:
    """What `settings.subsampling` names: `forward(log_mel [R, F, M], RowLayout) -> [R, F / factor, D]`.

    D is the width of the first stage. A convolution of stride 2 and kernel 3 sees, of the finer frames, its own two
    and one more: with `settings.causal_convolution` the one before, always. Else the last convolution sees the one
    before and all others the one behind, which centres the whole on the `factor` mel frames of target t: frame t sees
    factor * t - factor / 2 to factor * t + 3 * factor / 2 - 2. Causal, it sees factor * t - factor + 1 to
    factor * t + factor - 1. Gaps of factor / 2 mel frames between segments suffice. Stacking sees the target alone.
    """
    dim, factor, channels = settings.stages[0].dim, settings.subsampling_factor, settings.subsampling_channels
    if settings.subsampling == "stacking":
        return Stacking(settings.num_mels, dim, factor)
    if settings.subsampling == "striding":
        return Striding(settings.num_mels, channels, dim, factor, settings.causal_convolution)
    return Convolutional(settings.num_mels, channels, dim, settings.causal_convolution)


class Convolutional(nn.Module):
    """`[R, F, M] -> [R, F / 4, D]` by two full 3 x 3 convolutions of stride 2 and a projection.

    Source: Gulati et al., arXiv 2005.08100, section 2.
    """

    def __init__(self, num_mels: int, channels: int, dim: int, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.conv1 = nn.Linear(3 * 3, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Linear(_halve(num_mels, 2) * channels, dim)

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        x = convolve_mel(log_mel, layout.valid_mel, self.conv1, ahead=not self.causal)
        x = F.relu(self.conv2(x.permute(0, 3, 1, 2)), inplace=True)  # [R, channels, F / 4, M / 4]
        return self.out(x.permute(0, 2, 3, 1).flatten(2))


class Striding(nn.Module):
    """`[R, F, M] -> [R, F / factor, D]` by a full 3 x 3 convolution of stride 2, then depthwise ones and a projection.

    Every halving after the first is a depthwise 3 x 3 convolution of stride 2 and a pointwise map. Factor 8 costs less
    than `Convolutional` does for 4.

    Source: Rekesh et al. (FastConformer), arXiv 2305.05084, section 2.1; 256 channels there.
    """

    def __init__(self, num_mels: int, channels: int, dim: int, factor: int, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        halvings = factor.bit_length() - 1
        self.conv1 = nn.Linear(3 * 3, channels)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels) for _ in range(halvings - 1)
        )
        self.pointwise = nn.ModuleList(nn.Linear(channels, channels) for _ in range(halvings - 1))
        self.out = nn.Linear(_halve(num_mels, halvings) * channels, dim)

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        halvings, centred = len(self.depthwise) + 1, not self.causal
        x = convolve_mel(
            log_mel, layout.valid_mel, self.conv1, ahead=centred and halvings > 1, zeros_behind=centred and halvings > 2
        )
        for number, (convolution, pointwise) in enumerate(zip(self.depthwise, self.pointwise, strict=True), start=2):
            assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
            x = F.relu(pointwise(halve_depthwise(x, convolution.weight, convolution.bias)), inplace=True)
            if number < halvings:
                x = x * layout.valid_mel[:, :: 2**number, None, None].to(x.dtype)
        return self.out(x.flatten(2))


class Stacking(nn.Module):
    """`[R, F, M] -> [R, F / factor, D]`: a linear map of `factor` neighbouring mel frames."""

    def __init__(self, num_mels: int, dim: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.out = nn.Linear(factor * num_mels, dim)

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        x = log_mel * layout.valid_mel[..., None].to(log_mel.dtype)
        return self.out(x.unflatten(1, (-1, self.factor)).flatten(2))


def _halve(num_bins: int, times: int) -> int:
    """Mel bins after so many convolutions of stride 2 with a bin of padding to each side."""
    return -(-num_bins // 2**times)


def convolve_mel(
    log_mel: Tensor, valid_mel: Tensor, linear: nn.Linear, ahead: bool, zeros_behind: bool = False
) -> Tensor:
    """The first 3 x 3 convolution of stride 2 and its ReLU: `[R, F, M] -> [R, F / 2, M / 2, channels]`, zero in gaps.

    With one input channel a convolution is a small matrix product of its windows, which is a tenth of the time of the
    CPU's convolution, and leaves the channels last, as the next convolution likes them. In gaps the windows are zero,
    and so is what the bias is multiplied by: that saves a pass over the output, which is by far larger.

    Args:
        valid_mel: bool `[R, F]`.
        linear: from 9, of time x frequency, to `channels`.
        ahead: see the mel frame behind the two, not the one before.
        zeros_behind: give F / 2 + 1 frames, the last of zeros.
    """
    x = log_mel * valid_mel[..., None].to(log_mel.dtype)
    x = F.pad(x, (1, 1, 0, 1) if ahead else (1, 1, 1, 0)).unfold(1, 3, 2).unfold(2, 3, 2).flatten(-2)
    x = F.pad(x, (0, 1), value=1.0) * valid_mel[:, ::2, None, None].to(x.dtype)  # [R, F / 2, M / 2, 10]
    if zeros_behind:
        x = F.pad(x, (0, 0, 0, 0, 0, 1))
    weight = torch.cat([linear.weight, linear.bias[:, None]], dim=1)
    return F.relu(F.linear(x, weight), inplace=True)


def halve_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise 3 x 3 convolution of stride 2: `[R, T, M, C] -> [R, T // 2, M / 2, C]`.

    Output t sees frames 2t - 1 to 2t + 1; with T odd, the last frame being one of zeros, 2t to 2t + 2.

    Args:
        weight: `[C, 1, 3, 3]`.
        bias: `[C]`.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.device.type == "cpu":
        return _HalveDepthwise.apply(x, weight, bias)
    return _convolve_halving(x, weight, bias)


def _convolve_halving(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padding = (1 - x.shape[1] % 2, 1)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2, padding=padding, groups=len(weight))
    return out.permute(0, 2, 3, 1)


class _HalveDepthwise(torch.autograd.Function):
    """`_convolve_halving` with a fast input gradient.

    oneDNN's forward pass and weights' gradient are fast; its input gradient with a stride takes 8 times as long as
    two convolutions of stride 1 do: one for every other frame of the input, which a single output sees, by the middle
    line of the kernel, and one for the frames between, which two outputs see, by the outer lines. Between the mel bins
    of the output's gradient lie zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve_halving(x, weight, bias)

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
