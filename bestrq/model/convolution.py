"""The convolution module of a Conformer block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.layout import RowLayout
from bestrq.model.norms import make_norm


class ConvolutionModule(nn.Module):
    """Gated pointwise, depthwise, norm, SiLU and pointwise, `[R, T, D] -> [R, T, D]`; no output sees two segments."""

    def __init__(self, dim: int, kernel_size: int, norm: str) -> None:
        super().__init__()
        self.pointwise_in = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = make_norm(norm, dim)
        self.pointwise_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: RowLayout) -> Tensor:
        rows, frames, dim = x.shape
        x = F.glu(self.pointwise_in(x), dim=-1).flatten(0, 1)
        spread = x.new_zeros(rows * layout.num_spread, dim).index_copy(0, layout.slot, x[layout.frame])
        spread = self.depthwise(spread.unflatten(0, (rows, -1)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        x = torch.zeros_like(x, dtype=spread.dtype).index_copy(0, layout.frame, spread[layout.slot])
        return self.pointwise_out(F.silu(self.norm(x.unflatten(0, (rows, frames)))))
