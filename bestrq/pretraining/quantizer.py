"""The frozen random-projection quantizer: what BEST-RQ predicts.

Chiu et al. 2022, "Self-supervised learning with random-projection quantizer for speech recognition"
(arXiv 2202.01855), section 3.1. Two details decide whether it works and are often missed elsewhere: the input is
normalised per mel bin (else the codes collapse), and the projection is normalised along the *code* dimension.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

# Similarities of this many (stack, code) pairs are held at once: 64 MiB of float32.
MAX_SIMILARITIES = 1 << 24


@dataclass
class QuantizerSettings:
    """The frozen codebooks. All of it is drawn from `seed`, and stored in every checkpoint."""

    num_codebooks: int = 1
    """independent codebooks, each with its own projection and its own softmax head"""
    codebook_size: int = 8192
    """codes in a codebook"""
    codebook_dim: int = 16
    """dimensions that a stack of mel frames is projected to"""
    seed: int = 142
    """seed of the projections and the codes"""

    def __post_init__(self) -> None:
        for name in ("num_codebooks", "codebook_size", "codebook_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"quantizer.{name} is {getattr(self, name)}: give at least 1")


def stack_frames(log_mel: Tensor, stride: int) -> Tensor:
    """Join each `stride` consecutive mel frames: `[R, F, M]` -> `[R, T, stride * M]`.

    Stack t holds the mel frames of encoder frame t, because segments start at multiples of the factor.
    """
    rows, frames, num_mels = log_mel.shape
    if frames % stride:
        raise UserError(f"row_frames is {frames}: give a multiple of the encoder's stride {stride}")
    return log_mel.reshape(rows, frames // stride, stride * num_mels)


class RandomProjectionQuantizer(nn.Module):
    """Frozen projections and codebooks; no parameters, so nothing here is ever trained, decayed or sharded.

    Buffers: `projection` float32 `[C, stack_dim, codebook_dim]`, Xavier uniform; `codebook` float32
    `[C, V, codebook_dim]`, standard normal, each code scaled to unit norm.
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
        self.projection: Tensor
        self.codebook: Tensor

    @torch.no_grad()
    def forward(self, stacks: Tensor) -> Tensor:
        """Nearest code of each stack, in the buffers' own precision under any autocast.

        With both sides at unit norm the nearest code is the one with the largest inner product, so the lookup is one
        matmul and an argmax. The stack's projection needs no normalising for that: its norm scales all inner
        products of a row alike. It is normalised all the same, so that the products are cosines at any loudness.

        Args:
            stacks: normalised, unmasked mel stacks `[N, stack_dim]`.

        Returns:
            int64 `[N, C]`.
        """
        with torch.autocast(stacks.device.type, enabled=False):
            projected = torch.einsum("nk,ckd->cnd", stacks.to(self.projection.dtype), self.projection)
            projected = F.normalize(projected, dim=-1)
            chunk = max(1, MAX_SIMILARITIES // (self.codebook.shape[0] * self.codebook.shape[1]))
            codes_t = self.codebook.transpose(1, 2)
            nearest = [(part @ codes_t).argmax(dim=-1) for part in projected.split(chunk, dim=1)]
            return torch.cat(nearest, dim=1).T.contiguous()


def unigram_entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of the code frequencies `[..., V]` -> float64 `[...]`; 0 where nothing was counted.

    A model that knows only how often each code occurs reaches exactly this cross-entropy: a pretraining loss that
    does not fall below it has learned nothing from the context.
    """
    frequency = counts.double() / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.special.entr(frequency).sum(dim=-1)
