"""What attention knows of positions. They count from the start of a segment, wherever it lies in its row."""

import math

import torch
from torch import Tensor, nn


def rotary_phase(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Unit complex numbers of angle `position * theta^(-2 i / head_dim)`, `[..., head_dim / 2]`, from any `[...]`.

    Source: Su et al., RoFormer, arXiv 2104.09864: the product of a turned query and a turned key depends on the
    distance of the two frames only. Worked out in float64: at frame 90,000 (an hour) a float32 angle would be wrong by
    0.004 rad. Kept as complex64, and as complex128 for a `dtype` of float64.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = position.double()[..., None] * frequency
    kept = torch.complex128 if dtype == torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(angle), angle).to(kept)


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Turn `[..., head_dim]`, whose pairs are neighbours, by phases that broadcast against `[..., head_dim / 2]`.

    Reckoned and returned in the phases' precision, float32 or float64: in bfloat16 every angle would be rounded.
    """
    pairs = torch.view_as_complex(x.to(phase.real.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phase).flatten(-2)


def distance_bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket, int64 0 to `buckets - 1`, of int64 distances key - query.

    Half the buckets are for keys behind the query. In each half, the lower half are one distance each, the upper half
    grow with the logarithm of the distance up to `max_distance`, from where on all distances share the last.
    Source: Raffel et al., arXiv 1910.10683, section 2.1.
    """
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    share = torch.log(far.clamp(min=exact).double() / exact) / math.log(max_distance / exact)
    grown = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance > 0, half, 0) + torch.where(far < exact, far, grown)


class RelativeBias(nn.Module):
    """A learned number a head and bucket of distances, added to the scores of attention.

    It depends on the distance of key and query only, and is bounded however long the input is: distances never seen
    share the bucket of the longest ones that were.
    """

    bucket: Tensor

    def __init__(self, num_heads: int, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, buckets))
        distance = torch.arange(-max_distance, max_distance + 1)
        self.register_buffer("bucket", distance_bucket(distance, buckets, max_distance), persistent=False)

    def forward(self) -> Tensor:
        """`[H, 2 * D + 1]`: the bias of the distances -D to D, D being `max_distance`."""
        return self.weight[:, self.bucket]


class FourierPositions(nn.Module):
    """Learned features of a frame's position, to add to what stands there: `[R, T] -> [R, T, D]`.

    Cosines and sines of learned frequencies, then two linear maps with GELU between. The frequencies begin as
    `theta^(-2 i / D)`, as rotary positions' do, so that they cover distances from a frame to an hour.
    Source: Li et al., Learnable Fourier Features, arXiv 2106.02795, section 3.
    """

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        count = dim // 2
        self.frequency = nn.Parameter(theta ** (-torch.arange(count) / count))
        self.hidden = nn.Linear(2 * count, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, position: Tensor) -> Tensor:
        # Not under autocast: bfloat16 cannot tell the frames of a minute apart.
        angle = position[..., None].to(self.frequency.dtype) * self.frequency
        features = torch.cat((angle.cos(), angle.sin()), dim=-1) / angle.shape[-1] ** 0.5
        return self.out(nn.functional.gelu(self.hidden(features)))
