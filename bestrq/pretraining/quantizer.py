"""Random-projection quantizer: the targets of BEST-RQ, frozen unless `adaptation.py` estimates them.

Chiu et al. 2022, "Self-supervised learning with random-projection quantizer for speech recognition" (arXiv 2202.01855),
section 3.1. Two details are essential: the input is normalised per mel bin (otherwise the codes collapse), and the
projection is normalised along the *code* dimension.

N stacks, C codebooks, V codes per codebook.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from common.errors import UserError

# (stack, code) pairs compared at a time: 64 MiB of float32 similarities.
MAX_SIMILARITIES = 1 << 24


@dataclass
class QuantizerSettings:
    """Codebooks, drawn from `seed` and stored in every checkpoint. The last four fields: docs/objectives.md."""

    num_codebooks: PositiveInt = 1
    """independent codebooks, each with its own projection and softmax head"""
    codebook_size: PositiveInt = 8192
    """codes per codebook"""
    codebook_dim: PositiveInt = 16
    """dimensions of the projection of a stack of mel frames"""
    seed: int = 142
    """seed of projections and codes"""
    pca_steps: NonNegativeInt = 0
    """optimizer steps after which the principal components of their masked stacks replace the random projection; 0
    keeps it (RWTH, arXiv 2606.30671)"""
    whitening: ClosedUnitInterval = 0.0
    """with pca_steps: component i is divided by its standard deviation to this power; 1 whitens"""
    refine_steps: list[PositiveInt] = field(default_factory=list)
    """optimizer steps after which every code becomes the mean of its projected stacks (arXiv 2606.30671)"""
    refine_window: PositiveInt = 500
    """optimizer steps up to a refinement from which its means are taken"""

    @property
    def adapts(self) -> bool:
        """Whether projection or codes change during the run."""
        return bool(self.pca_steps or self.refine_steps)

    def __post_init__(self) -> None:
        if self.whitening and not self.pca_steps:
            raise UserError(f"quantizer.whitening is {self.whitening}, but pca_steps is 0: give both, or neither")


def stack_frames(log_mel: Tensor, stride: int) -> Tensor:
    """Concatenate each `stride` consecutive mel frames: `[R, F, M]` -> `[R, T, stride * M]`.

    Stack t holds the mel frames of encoder frame t, because segments start at multiples of the stride.
    """
    rows, frames, num_mels = log_mel.shape
    if frames % stride:
        raise UserError(f"row_frames is {frames}: give a multiple of the encoder's stride {stride}")
    return log_mel.reshape(rows, frames // stride, stride * num_mels)


class RandomProjectionQuantizer(nn.Module):
    """Projections and codebooks, as buffers: they are neither trained nor decayed nor sharded.

    `projection`: float32 `[C, stack_dim, codebook_dim]`, Xavier uniform. `codebook`: float32 `[C, V, codebook_dim]`,
    standard normal, each code scaled to unit norm. `offset`, with pca_steps only: float32 `[C, codebook_dim]`, added to
    the projected stack; 0 until the principal components are known.
    """

    def __init__(self, settings: QuantizerSettings, stack_dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(settings.seed)
        bound = math.sqrt(6 / (stack_dim + settings.codebook_dim))
        projection = torch.empty(settings.num_codebooks, stack_dim, settings.codebook_dim)
        projection.uniform_(-bound, bound, generator=generator)
        codes = torch.randn(settings.num_codebooks, settings.codebook_size, settings.codebook_dim, generator=generator)
        self.register_buffer("projection", projection)
        self.register_buffer("codebook", F.normalize(codes, dim=-1))
        offset = torch.zeros(settings.num_codebooks, settings.codebook_dim) if settings.pca_steps else None
        self.register_buffer("offset", offset)  # None is not in the state
        self.projection: Tensor
        self.codebook: Tensor
        self.offset: Tensor | None

    def project(self, stacks: Tensor) -> Tensor:
        """Projected stacks of unit norm, `[N, stack_dim]` -> `[C, N, codebook_dim]`, in float32 under any autocast."""
        with torch.autocast(stacks.device.type, enabled=False):
            projected = torch.einsum("nk,ckd->cnd", stacks.to(self.projection.dtype), self.projection)
            return F.normalize(projected if self.offset is None else projected + self.offset[:, None], dim=-1)

    @torch.no_grad()
    def forward(self, stacks: Tensor) -> Tensor:
        """Nearest code of every stack, in the precision of the buffers under any autocast.

        Codes have unit norm, so the nearest code is the one with the largest inner product: one matrix product and an
        argmax. Normalising the projected stack does not change the argmax; it bounds the products at any loudness.

        Args:
            stacks: normalised, unmasked mel stacks `[N, stack_dim]`.

        Returns:
            int64 `[N, C]`.
        """
        with torch.autocast(stacks.device.type, enabled=False):
            projected = self.project(stacks)
            chunk = max(1, MAX_SIMILARITIES // (self.codebook.shape[0] * self.codebook.shape[1]))
            codes_t = self.codebook.transpose(1, 2)
            nearest = [(part @ codes_t).argmax(dim=-1) for part in projected.split(chunk, dim=1)]
            return torch.cat(nearest, dim=1).T.contiguous()
