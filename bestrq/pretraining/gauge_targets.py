"""Targets for the gauge: codes of the training's own quantizer and k-means, fitted on arrays without training.

The seam is `CodeFunction`: rows of features in, int64 codes `[N, C]` out. Targets of exports are computed by
`Teacher` (`pipelines/gauge_exports.py`).

N frames, K input dimensions, V codes, C codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor

from bestrq.pretraining.adaptation import Adaptation
from bestrq.pretraining.clustering import estimate_clusters, nearest_cluster
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.training.process import World
from common.errors import UserError

Kind = Literal["random", "pca", "refined", "kmeans", "mfcc", "clusters", "ctc_labels"]
CodeFunction = Callable[[Tensor], Tensor]
"""rows of features, float32 [N, K] -> codes, int64 [N, C] from 0 to V - 1"""
# Sources: `random` and `pca` have the size of Chiu et al. 2022 (arXiv 2202.01855), section 4.1; the clusters of a layer
# are the 500 of HuBERT's second iteration, those of MFCC the 100 of its first (arXiv 2106.07447, section IV-B).
_SIZES = {"random": 8192, "pca": 8192, "refined": 1024, "kmeans": 500, "mfcc": 100, "clusters": 500, "ctc_labels": 0}
_QUANTIZER = ("codebook_size", "num_codebooks", "codebook_dim", "seed")
_FIELDS: dict[Kind, tuple[str, ...]] = {
    "random": _QUANTIZER,
    "pca": (*_QUANTIZER, "whitening"),
    "refined": (*_QUANTIZER, "whitening", "projection", "refinements"),
    "kmeans": ("clusters", "seed"),
    "mfcc": ("clusters", "seed"),
    "clusters": ("export", "layer", "clusters", "seed"),
    "ctc_labels": ("export", "blank"),
}
_MFCC = 13


@dataclass(frozen=True)
class TargetSettings:
    """A target to be judged. Fields of the same name: `quantizer` and `targets` of pretrain.py."""

    kind: Kind = "random"
    """'random': random-projection quantizer. 'pca': with principal components as projection. 'refined': with codes
    refined after that. 'kmeans', 'mfcc': k-means of mel stacks or of cepstra with deltas. 'clusters': k-means of a
    block of an export. 'ctc_labels': most probable label of an export with a CTC head"""
    name: str = ""
    """name in tables; empty takes the specification"""
    codebook_size: NonNegativeInt = 0
    """codes per codebook; 0 takes 8192 (random, pca) or 1024 (refined)"""
    num_codebooks: PositiveInt = 1
    """codebooks; those of 'pca' have different random codes in the same projection"""
    codebook_dim: PositiveInt = 16
    """dimensions of the projection"""
    projection: Literal["pca", "random"] = "pca"
    """projection of 'refined': that of quantizer.pca_steps, or that of 'random'"""
    whitening: ClosedUnitInterval = 0.0
    """PCA: component i is divided by its standard deviation to this power; 1 whitens"""
    refinements: PositiveInt = 10
    """'refined': number of quantizer.refine_steps, each with the same frames"""
    export: str = ""
    """'clusters', 'ctc_labels': folder of an export or a checkpoint"""
    layer: NonNegativeInt = 0
    """'clusters': block, from 1, whose outputs are clustered; 0: at two thirds of the depth"""
    clusters: NonNegativeInt = 0
    """number of clusters; 0 takes 500 (kmeans, clusters) or 100 (mfcc)"""
    blank: Literal["fill", "keep", "without"] = "fill"
    """'ctc_labels': frames of the blank take the label of the nearest frame with one, keep the blank, or take their
    most probable other label"""
    seed: int | None = None
    """seed of projections and codes, or of k-means; null takes the defaults of pretrain.py, 142 and 0"""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default and item.name not in ("kind", "name", *_FIELDS[self.kind]):
                raise UserError(
                    f"target of kind {self.kind!r} has {item.name}={value}, which has no effect: leave it out; its "
                    f"fields are name, {', '.join(_FIELDS[self.kind])}"
                )
        if self.whitening and self.kind == "refined" and self.projection == "random":
            raise UserError(f"target has whitening={self.whitening}, but projection=random: give one of them")
        if "export" in _FIELDS[self.kind] and not self.export:
            raise UserError(f"target of kind {self.kind!r} lacks its export: write {self.kind},export=FOLDER")

    def with_defaults(self) -> TargetSettings:
        """Settings with sizes in place of 0 and a seed; a CTC target has neither."""
        seed = self.seed
        if seed is None and "seed" in _FIELDS[self.kind]:
            seed = 142 if "codebook_size" in _FIELDS[self.kind] else 0
        if "clusters" in _FIELDS[self.kind]:
            return replace(self, clusters=self.clusters or _SIZES[self.kind], seed=seed)
        if "codebook_size" in _FIELDS[self.kind]:
            return replace(self, codebook_size=self.codebook_size or _SIZES[self.kind], seed=seed)
        return self

    @property
    def num_fitted(self) -> int:
        """Codes that are estimated from frames, and need at least as many; 0 if they are drawn or given."""
        full = self.with_defaults()
        return full.clusters or (full.codebook_size if self.kind == "refined" else 0)


def quantizer_settings(settings: TargetSettings) -> QuantizerSettings:
    """Settings of the quantizer of 'random', 'pca' and 'refined', with changes at steps 1, 2, ..."""
    settings = settings.with_defaults()
    assert settings.seed is not None
    pca = settings.kind == "pca" or (settings.kind == "refined" and settings.projection == "pca")
    return QuantizerSettings(
        num_codebooks=settings.num_codebooks,
        codebook_size=settings.codebook_size,
        codebook_dim=settings.codebook_dim,
        seed=settings.seed,
        pca_steps=int(pca),
        whitening=settings.whitening,
        refine_steps=list(range(2, 2 + settings.refinements)) if settings.kind == "refined" else [],
        refine_window=1,
    )


def fit(settings: TargetSettings, rows: Tensor) -> CodeFunction:
    """Code function of a target that needs no model, fitted on rows of features.

    Args:
        settings: any kind without an export.
        rows: float32 `[N, K]`: normalised mel stacks or cepstra.

    Raises UserError if there are fewer rows than codes to be estimated, or fewer dimensions than codebook_dim.
    """
    settings = settings.with_defaults()
    if settings.num_fitted > len(rows):
        raise UserError(
            f"the target has {settings.num_fitted} codes, but is fitted on {len(rows)} frames: give fewer codes or "
            "more data.fit_minutes"
        )
    if settings.clusters:
        assert settings.seed is not None
        centroids = estimate_clusters(rows, settings.clusters, settings.seed)
        return lambda frames: nearest_cluster(frames, centroids)[:, None]
    return fit_quantizer(quantizer_settings(settings), rows)


def fit_quantizer(settings: QuantizerSettings, rows: Tensor) -> RandomProjectionQuantizer:
    """Quantizer after steps of pretraining that all have these rows as stacks with a target, float32 `[N, K]`."""
    quantizer = RandomProjectionQuantizer(settings, rows.shape[1])
    if settings.adapts:
        adaptation, world = Adaptation(quantizer, settings), World()
        for step in range(1, 1 + max([settings.pca_steps, *settings.refine_steps])):
            adaptation.observe(step, rows, quantizer(rows))
            adaptation.update(step, world)
    return quantizer


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
