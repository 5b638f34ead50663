"""From mel frames to encoder frames: two strided convolutions, four mel frames to one."""

import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.layout import RowLayout


class Subsampling(nn.Module):
    """`[R, F, M] -> [R, F / 4, D]` by two 3 x 3 convolutions of stride 2 and a projection.

    In time the first sees its two frames and the next one, the second its two frames and the one before: encoder frame
    t sees mel frames 4t - 2 to 4t + 4, centred on the four of its target. Both see zeros in the gaps, each at its own
    resolution: else what the first makes of the frames behind a segment (its bias, if nothing else) would reach the
    second.
    """

    def __init__(self, num_mels: int, channels: int, dim: int) -> None:
        super().__init__()
        # With one input channel a convolution is a small matrix product of its windows, which is a tenth of the time
        # of the CPU's convolution, and leaves the channels last, as the second convolution likes them.
        self.conv1 = nn.Linear(3 * 3, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        bins = (num_mels + 1) // 2
        self.out = nn.Linear((bins + 1) // 2 * channels, dim)

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        x = log_mel * layout.valid_mel[..., None].to(log_mel.dtype)
        windows = F.pad(x, (1, 1, 0, 1)).unfold(1, 3, 2).unfold(2, 3, 2).flatten(-2)  # [R, F / 2, M / 2, 9]
        x = F.relu(self.conv1(windows))
        x = x * layout.valid_half[..., None, None].to(x.dtype)
        x = F.relu(self.conv2(x.permute(0, 3, 1, 2)))  # [R, channels, F / 4, M / 4]
        return self.out(x.permute(0, 2, 3, 1).flatten(2))
