"""From mel frames to encoder frames: two strided convolutions, four mel frames to one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.layout import RowLayout


class Subsampling(nn.Module):
    """`[R, F, M] -> [R, F / 4, D]` by two convolutions of stride 2 and a projection.

    In time the first sees its two frames and the next, the second its two frames and the one before: encoder frame t
    sees mel frames 4t - 2 to 4t + 4, centred on the four of its target. Both see zeros in the gaps, at their own
    resolution: what the first makes of a segment's end is not read as the next segment's beginning.
    """

    def __init__(self, num_mels: int, channels: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2)
        bins = (num_mels + 1) // 2
        self.out = nn.Linear(channels * ((bins + 1) // 2), dim)

    def forward(self, log_mel: Tensor, layout: RowLayout) -> Tensor:
        x = log_mel.masked_fill(~layout.valid_mel[..., None], 0.0)[:, None]  # [R, 1, F, M]
        x = F.relu(self.conv1(F.pad(x, (1, 1, 0, 1))))
        x = x.masked_fill(~layout.valid_half[:, None, :, None], 0.0)
        x = F.relu(self.conv2(F.pad(x, (1, 1, 1, 0))))
        return self.out(x.transpose(1, 2).flatten(2))
