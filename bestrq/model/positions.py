"""Rotary positions: queries and keys turned by angles that grow with their position.

Source: Su et al., RoFormer, arXiv 2104.09864. The product of a turned query and a turned key depends on the distance of
the two frames only, so positions count from the start of a segment, wherever it lies in its row.
"""

import torch
from torch import Tensor


def rotary_phase(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Unit complex numbers of angle `position * theta^(-2 i / head_dim)`, `[..., head_dim / 2]`, from int64 `[...]`.

    Worked out in float64: at frame 90,000 (an hour) a float32 angle would be wrong by 0.004 rad. Kept as complex64,
    and as complex128 for a `dtype` of float64.
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
