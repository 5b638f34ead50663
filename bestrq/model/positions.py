"""Rotary positions: queries and keys turned by angles that grow with their position.

Source: Su et al., RoFormer, arXiv 2104.09864. The product of a turned query and a turned key depends on the distance of
the two frames only, so positions count from the start of a segment wherever it lies in its row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RotaryTable:
    """Cosine and sine of every frame's angles, `[R, T, 1, head width / 2]`, float32 (float64 in a float64 encoder)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def make(
        cls, position: Tensor, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
    ) -> "RotaryTable":
        """Angles `position * theta^(-2 i / head_dim)` for int64 positions `[R, T]`.

        Worked out in float64: at frame 90,000 (an hour) a float32 angle would be wrong by 0.004 rad.
        """
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angle = position.cpu().double()[:, :, None, None] * theta**-exponent
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(angle.cos().to(device, kept), angle.sin().to(device, kept))

    def turn(self, x: Tensor) -> Tensor:
        """Turn `[R, T, H, head width]`, whose pair i is the elements i and i + half; reckoned in the table's dtype."""
        first, second = x.to(self.cos.dtype).chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x.dtype)
