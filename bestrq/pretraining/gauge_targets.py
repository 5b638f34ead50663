"""Targets for the gauge: functions from frames to codes, fitted on arrays without training.

Private to the gauge. The seam is `CodeFunction`: rows of features in, int64 codes `[N, C]` out.

N frames, K input dimensions, D dimensions of a projection, V codes, C codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor

from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from common.errors import UserError

Kind = Literal["random", "pca", "refined", "kmeans", "mfcc", "layer", "ctc"]
CodeFunction = Callable[[Tensor], Tensor]
"""rows of features, float32 [N, K] -> codes, int64 [N, C] from 0 to V - 1"""
# (frame, code) pairs compared at a time: 64 MiB of float32.
_MAX_PAIRS = 1 << 24
# Sources: `random` and `pca` have the size of Chiu et al. 2022 (arXiv 2202.01855), section 4.1; the clusters of a layer
# are the 500 of HuBERT's second iteration, those of MFCC the 100 of its first (arXiv 2106.07447, section IV-B).
_SIZES = {"random": 8192, "pca": 8192, "refined": 1024, "kmeans": 500, "mfcc": 100, "layer": 500, "ctc": 0}
_EXPORT_KINDS = ("layer", "ctc")
_MFCC = 13


@dataclass(frozen=True)
class TargetSettings:
    """A target to be judged."""

    kind: Kind = "random"
    """'random': random-projection quantizer. 'pca': random codes in a PCA projection. 'refined': random codes, refined
    by spherical k-means in a PCA or random projection. 'kmeans', 'mfcc': k-means of mel stacks or of cepstra with
    deltas. 'layer': k-means of a layer of an export. 'ctc': most probable label of an export with a CTC head"""
    name: str = ""
    """name in tables; empty takes the specification"""
    codebook_size: NonNegativeInt = 0
    """codes per codebook; 0 takes 8192 (random, pca), 1024 (refined), 500 (kmeans, layer) or 100 (mfcc)"""
    num_codebooks: PositiveInt = 1
    """codebooks; those of 'pca' and 'refined' have different random codes in the same projection"""
    codebook_dim: PositiveInt = 16
    """dimensions of the projection of 'random', 'pca' and 'refined'"""
    projection: Literal["pca", "random"] = "pca"
    """projection of 'refined'"""
    whiten: ClosedUnitInterval = 1.0
    """PCA: 0 keeps the variances of the components, 1 makes them equal, 0.5 is between"""
    iterations: PositiveInt = 10
    """passes of k-means"""
    export: str = ""
    """'layer', 'ctc': folder of an export or a checkpoint"""
    layer: int = -1
    """'layer': block from 1; 0 is the output of the subsampling, negative numbers count from the last block"""
    blank: Literal["keep", "nearest", "without"] = "keep"
    """'ctc': frames of blanks keep the blank, take the nearest other label, or their most probable other label"""
    seed: int = 142
    """seed of projections, codes and starts of k-means"""

    def __post_init__(self) -> None:
        if self.kind in _EXPORT_KINDS and not self.export:
            raise UserError(f"target of kind {self.kind!r} lacks its export: write {self.kind},export=FOLDER")
        if self.export and self.kind not in _EXPORT_KINDS:
            raise UserError(
                f"target of kind {self.kind!r} has export={self.export}, which only 'layer' and 'ctc' read: choose one"
            )
        if self.num_codebooks > 1 and self.kind in ("kmeans", "mfcc", "ctc", "layer"):
            raise UserError(f"num_codebooks is {self.num_codebooks}: targets of kind {self.kind!r} have one codebook")

    def with_size(self) -> TargetSettings:
        """Settings with the codebook size in place of 0; a CTC target keeps 0."""
        return replace(self, codebook_size=self.codebook_size or _SIZES[self.kind])


def fit(settings: TargetSettings, rows: Tensor) -> CodeFunction:
    """Code function of a target that needs no model, fitted on rows of features.

    Args:
        settings: any kind but 'ctc'; 'layer' receives the outputs of the layer.
        rows: float32 `[N, K]`: normalised mel stacks, cepstra or hidden states.

    Raises UserError if there are fewer rows than codes to be estimated.
    """
    settings = settings.with_size()
    if settings.kind == "random":
        quantizer = QuantizerSettings(
            num_codebooks=settings.num_codebooks, codebook_size=settings.codebook_size,
            codebook_dim=settings.codebook_dim, seed=settings.seed,
        )  # fmt: skip
        return RandomProjectionQuantizer(quantizer, rows.shape[1])
    if settings.kind != "pca" and len(rows) < settings.codebook_size:
        raise UserError(
            f"codebook_size is {settings.codebook_size}, but the targets are fitted on {len(rows)} frames: give fewer "
            "codes or more data.fit_minutes"
        )
    if settings.kind in ("pca", "refined"):
        return _fit_directions(settings, rows)
    # k-means in the space of equal variances would weigh noise; bins and units of one scale need no whitening.
    centres = kmeans(rows, settings.codebook_size, settings.iterations, settings.seed)
    return lambda frames: nearest_centres(frames, centres)[:, None]


def _fit_directions(settings: TargetSettings, rows: Tensor) -> CodeFunction:
    """Codes of unit norm in a projection, chosen by the largest inner product."""
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.kind == "pca" or settings.projection == "pca":
        mean, matrix = pca(rows, settings.codebook_dim, settings.whiten)
    else:
        quantizer = QuantizerSettings(codebook_size=1, codebook_dim=settings.codebook_dim, seed=settings.seed)
        mean = torch.zeros(rows.shape[1])
        matrix = RandomProjectionQuantizer(quantizer, rows.shape[1]).projection[0]
    books = []
    for _ in range(settings.num_codebooks):
        shape = settings.codebook_size, settings.codebook_dim
        codes = F.normalize(torch.randn(shape, generator=generator), dim=1)
        if settings.kind == "refined":
            projected = F.normalize((rows - mean) @ matrix, dim=1)
            codes = spherical_kmeans(projected, codes, settings.iterations)
        books.append(codes)
    return lambda frames: torch.stack([nearest_directions((frames - mean) @ matrix, codes) for codes in books], dim=1)


def pca(rows: Tensor, dim: int, whiten: float) -> tuple[Tensor, Tensor]:
    """Mean `[K]` and projection `[K, dim]` on the first principal components, float32, from rows `[N, K]`.

    Component i is divided by the power `whiten` of its standard deviation; 1 is whitening. Raises UserError if there
    are fewer than `dim` dimensions.
    """
    if dim > rows.shape[1]:
        raise UserError(f"codebook_dim is {dim}, but the input has {rows.shape[1]} dimensions: give at most that")
    mean = rows.double().mean(dim=0)
    centred = rows.double() - mean
    variance, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    variance, vectors = variance.flip(0)[:dim], vectors.flip(1)[:, :dim]
    # The sign of a component is arbitrary: the largest weight is made positive, so that all machines agree.
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return mean.float(), (vectors * variance.clamp(min=1e-8) ** (-whiten / 2)).float()


def nearest_directions(rows: Tensor, codes: Tensor) -> Tensor:
    """Index of the code with the largest inner product, int64 `[N]`; rows `[N, D]`, codes of unit norm `[V, D]`."""
    chunk = max(1, _MAX_PAIRS // len(codes))
    return torch.cat([(part @ codes.T).argmax(dim=1) for part in rows.split(chunk)])


def nearest_centres(rows: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre by Euclidean distance, int64 `[N]`; rows `[N, K]`, centres `[V, K]`."""
    half = centres.square().sum(dim=1) / 2  # |x - c|^2 / 2 = |x|^2 / 2 - (x c - |c|^2 / 2)
    chunk = max(1, _MAX_PAIRS // len(centres))
    return torch.cat([torch.addmm(-half, part, centres.T).argmax(dim=1) for part in rows.split(chunk)])


def _means(rows: Tensor, assigned: Tensor, old: Tensor) -> Tensor:
    """Means of the rows of every code; a code without rows keeps its old place."""
    counts = torch.bincount(assigned, minlength=len(old)).to(rows.dtype)[:, None]
    sums = torch.zeros_like(old).index_add_(0, assigned, rows)
    return torch.where(counts > 0, sums / counts.clamp(min=1), old)


def kmeans(rows: Tensor, num_centres: int, iterations: int, seed: int) -> Tensor:
    """Centres `[V, K]` of k-means (Lloyd 1982), from distinct random rows, `[N, K]`."""
    order = np.random.default_rng(seed).permutation(len(rows))[:num_centres]
    centres = rows[torch.from_numpy(order)].clone()
    for _ in range(iterations):
        centres = _means(rows, nearest_centres(rows, centres), centres)
    return centres


def spherical_kmeans(rows: Tensor, codes: Tensor, iterations: int) -> Tensor:
    """Codes of unit norm `[V, D]`, refined to the normalised means of their rows (Dhillon and Modha 2001).

    A code without rows keeps its direction. rows: unit norm, `[N, D]`; codes: unit norm, `[V, D]`, the start.
    """
    for _ in range(iterations):
        codes = F.normalize(_means(rows, nearest_directions(rows, codes), codes), dim=1)
    return codes


def cepstra(log_mel: Tensor) -> Tensor:
    """13 cepstra with first and second differences, float32 `[F, 39]`, from log-mel `[F, M]`.

    Orthonormal DCT-II over the bins; differences are regressions over 5 frames. HuBERT's first targets cluster such
    vectors; here they come from normalised log-mel, so that every bin has the same weight.
    """
    bins = log_mel.shape[1]
    order, place = torch.arange(_MFCC)[:, None], torch.arange(bins)[None]
    basis = torch.cos(torch.pi * order * (2 * place + 1) / (2 * bins)) * (2 / bins) ** 0.5
    basis[0] /= 2**0.5
    static = log_mel @ basis.T
    first = _slope(static)
    return torch.cat([static, first, _slope(first)], dim=1)


def _slope(values: Tensor) -> Tensor:
    """Slope of a regression over 5 frames, the ends repeated: `[F, K]` -> `[F, K]`."""
    padded = torch.cat([values[:1], values[:1], values, values[-1:], values[-1:]])
    count = len(values)
    return sum((step * padded[2 + step : 2 + step + count] for step in (-2, -1, 1, 2)), torch.zeros_like(values)) / 10


def fill_blanks(labels: Tensor, blank: int = 0) -> Tensor:
    """Replace each blank by the nearest other label, the earlier one at equal distance; int64 `[T]`.

    Labels that are all blank stay unchanged.
    """
    places = (labels != blank).nonzero().squeeze(1)
    if not len(places):
        return labels
    frame = torch.arange(len(labels))
    after = torch.searchsorted(places, frame).clamp(max=len(places) - 1)
    before = (after - 1).clamp(min=0)
    earlier = (frame - places[before]).abs() <= (places[after] - frame).abs()
    return labels[torch.where(earlier, places[before], places[after])]
