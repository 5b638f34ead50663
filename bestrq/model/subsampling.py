"""Subsampling of mel frames to encoder frames, by a stride of 2, 4 or 8.

Rows are packed (see `RowLayout`). A convolution adds its bias in gaps too, which must not reach the next convolution:
gaps are zeroed before each one, at its resolution. After k halvings a frame is valid if the first of its 2^k mel frames
is, as segments start at multiples of the stride.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.cpu.convolution import HalveDepthwise, convolve_stride_2
from bestrq.model.layout import RowLayout
from bestrq.model.settings import EncoderSettings


def make_subsampling(settings: EncoderSettings) -> nn.Module:
    """Build the module of `settings.subsampling`: `forward(log_mel [R, F, M], RowLayout) -> [R, F / stride, D]`.

    D is the width of the first stage. A convolution of stride 2 and kernel 3 covers two input frames and a third:
    always the previous frame with `settings.causal_convolution`. Otherwise the last convolution covers the previous
    frame and all others the next one, which centres output t on the `stride` mel frames of its target: it depends on
    mel frames stride * t - stride / 2 to stride * t + 3 * stride / 2 - 2; if causal, on stride * t - stride + 1 to
    stride * t + stride - 1. Gaps of stride / 2 mel frames between segments suffice. Stacking covers the target only.
    """
    dim, stride, channels = settings.stages[0].dim, settings.subsampling_factor, settings.subsampling_channels
    if settings.subsampling == "stacking":
        return Stacking(settings.num_mels, dim, stride)
    if settings.subsampling == "striding":
        return Striding(settings.num_mels, channels, dim, stride, settings.causal_convolution)
    return Convolutional(settings.num_mels, channels, dim, settings.causal_convolution)


class Convolutional(nn.Module):
    """Two 3 x 3 convolutions of stride 2 and a projection, `[R, F, M] -> [R, F / 4, D]`.

    Source: Gulati et al., arXiv 2005.08100, section 2.
    """

    def __init__(self, num_mels: int, channels: int, dim: int, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.conv1 = nn.Linear(3 * 3, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Linear(-(-num_mels // 4) * channels, dim)

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        x = convolve_mel(log_mel, layout.valid_mel, self.conv1, ahead=not self.causal)
        x = F.relu(self.conv2(x.permute(0, 3, 1, 2)), inplace=True)  # [R, channels, F / 4, M / 4]
        return self.out(x.permute(0, 2, 3, 1).flatten(2))


class Striding(nn.Module):
    """A 3 x 3 convolution of stride 2, depthwise-separable ones and a projection, `[R, F, M] -> [R, F / stride, D]`.

    Every halving after the first is a depthwise 3 x 3 convolution of stride 2 and a pointwise layer. Stride 8 costs
    less than `Convolutional` with its stride of 4.

    Source: Rekesh et al. (FastConformer), arXiv 2305.05084, section 2.1, with 256 channels.
    """

    def __init__(self, num_mels: int, channels: int, dim: int, stride: int, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        halvings = stride.bit_length() - 1
        self.conv1 = nn.Linear(3 * 3, channels)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels) for _ in range(halvings - 1)
        )
        self.pointwise = nn.ModuleList(nn.Linear(channels, channels) for _ in range(halvings - 1))
        self.out = nn.Linear(-(-num_mels // stride) * channels, dim)

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        halvings, centred = len(self.depthwise) + 1, not self.causal
        ahead, append_zeros = centred and halvings > 1, centred and halvings > 2
        x = convolve_mel(log_mel, layout.valid_mel, self.conv1, ahead, append_zeros)
        for number, (convolution, pointwise) in enumerate(zip(self.depthwise, self.pointwise, strict=True), start=2):
            assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
            x = F.relu(pointwise(halve_depthwise(x, convolution.weight, convolution.bias)), inplace=True)
            if number < halvings:
                x = x * layout.valid_mel[:, :: 2**number, None, None].to(x.dtype)
        return self.out(x.flatten(2))


class Stacking(nn.Module):
    """Linear layer on `stride` neighbouring mel frames, `[R, F, M] -> [R, F / stride, D]`."""

    def __init__(self, num_mels: int, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.out = nn.Linear(stride * num_mels, dim)

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        x = log_mel * layout.valid_mel[..., None].to(log_mel.dtype)
        return self.out(x.unflatten(1, (-1, self.stride)).flatten(2))


def convolve_mel(
    log_mel: Tensor, valid_mel: Tensor, linear: nn.Linear, ahead: bool, append_zeros: bool = False
) -> Tensor:
    """First 3 x 3 convolution, of stride 2 and with ReLU: `[R, F, M] -> [R, F / 2, M / 2, channels]`, zero in gaps.

    With one input channel, the convolution is a small matrix product of its windows. This takes a tenth of the time of
    torch's convolution on a CPU and leaves the channels last, as the next convolution needs them. In gaps, the windows
    and the factor of the bias are zero, which saves a pass over the much larger output.

    Args:
        valid_mel: bool `[R, F]`.
        linear: maps the 9 values of a window, time x frequency, to `channels`.
        ahead: the third frame of a window is the next mel frame, not the previous one.
        append_zeros: return F / 2 + 1 frames, the last one zero.
    """
    x = log_mel * valid_mel[..., None].to(log_mel.dtype)
    x = F.pad(x, (1, 1, 0, 1) if ahead else (1, 1, 1, 0)).unfold(1, 3, 2).unfold(2, 3, 2).flatten(-2)
    x = F.pad(x, (0, 1), value=1.0) * valid_mel[:, ::2, None, None].to(x.dtype)  # [R, F / 2, M / 2, 10]
    if append_zeros:
        x = F.pad(x, (0, 0, 0, 0, 0, 1))
    weight = torch.cat([linear.weight, linear.bias[:, None]], dim=1)
    return F.relu(F.linear(x, weight), inplace=True)


def halve_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise 3 x 3 convolution of stride 2: `[R, T, M, C] -> [R, T // 2, M / 2, C]`.

    Output t covers frames 2t - 1 to 2t + 1 if T is even. If T is odd, with zeros in the last frame, 2t to 2t + 2.

    Args:
        weight: `[C, 1, 3, 3]`.
        bias: `[C]`.
    """
    convolve = HalveDepthwise.apply if x.device.type == "cpu" else convolve_stride_2
    return convolve(x, weight.to(x.dtype), bias.to(x.dtype))
