"""Rotary phases of the positions of frames in their segment."""

import torch
from torch import Tensor


def rotary_phase(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of the rotary phases `position * theta^(-2 i / head_dim)`, `[...] -> [..., head_dim / 2, 2]`.

    The product of a rotated query and key depends only on the distance of their frames: Su et al., RoFormer, arXiv
    2104.09864. Angles are float64: at frame 90,000 (one hour) a float32 angle would be off by 0.004 rad. The result is
    float32, or float64 if `dtype` is float64.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=position.device) / head_dim
    angle = position.double()[..., None] * theta**-exponent
    phase = torch.stack((angle.cos(), angle.sin()), dim=-1)
    return phase if dtype == torch.float64 else phase.float()
