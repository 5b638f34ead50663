"""Learned positions: relative bias, Fourier features. Imported only if used."""

import math

import torch
from torch import Tensor, nn


def distance_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance (key - query), int64 from 0 to `buckets - 1`.

    The upper half of the buckets is for keys after the query. In each half, the lower buckets hold single distances,
    the upper ones logarithmic ranges up to `max_distance`; all larger distances share the last bucket.
    Source: Raffel et al., arXiv 1910.10683, section 2.1.
    """
    half = buckets // 2
    exact = half // 2
    absolute = distance.abs()
    share = torch.log(absolute.clamp(min=exact).double() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance > 0, half, 0) + torch.where(absolute < exact, absolute, logarithmic)


class RelativeBias(nn.Module):
    """Learned bias on attention scores, per head and bucket of distances.

    The bias depends only on the distance of key and query. It stays bounded for inputs longer than those in training,
    as all long distances share a bucket.
    """

    bucket: Tensor

    def __init__(self, num_heads: int, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, buckets))
        distance = torch.arange(-max_distance, max_distance + 1)
        self.register_buffer("bucket", distance_bucket(distance, buckets, max_distance), persistent=False)

    def forward(self) -> Tensor:
        """Bias at distances -D to D, `[H, 2 * D + 1]` with D = `max_distance`."""
        return self.weight[:, self.bucket]


class FourierPositions(nn.Module):
    """Learned Fourier features of positions, `[R, T] -> [R, T, D]`, added to the input of the first block.

    Cosines and sines of learned frequencies, then two linear layers with GELU in between. Frequencies start at
    `theta^(-2 i / D)`, as in rotary positions, to cover distances from one frame to an hour.
    Source: Li et al., Learnable Fourier Features, arXiv 2106.02795, section 3.
    """

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        count = dim // 2
        self.frequency = nn.Parameter(theta ** (-torch.arange(count) / count))
        self.hidden = nn.Linear(2 * count, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, position: Tensor) -> Tensor:
        # Autocast leaves an elementwise product in float32; bfloat16 could not distinguish the frames of a minute.
        angle = position[..., None].to(self.frequency.dtype) * self.frequency
        features = torch.cat((angle.cos(), angle.sin()), dim=-1) / angle.shape[-1] ** 0.5
        return self.out(nn.functional.gelu(self.hidden(features)))
