"""Targets of the gauge: codes of the training's quantizer and k-means on rows."""

import pytest
import torch

from bestrq.pretraining.clustering import estimate_clusters, nearest_cluster
from bestrq.pretraining.gauge_targets import TargetSettings, cepstra, fit, quantizer_settings
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from common.errors import UserError


def rows(count: int = 600, width: int = 24, seed: int = 0) -> torch.Tensor:
    """Correlated rows with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix + 3


def test_random_targets_are_those_of_pretraining() -> None:
    settings = TargetSettings(kind="random", codebook_size=64, num_codebooks=3, seed=5)
    quantizer = RandomProjectionQuantizer(QuantizerSettings(num_codebooks=3, codebook_size=64, seed=5), 24)
    assert torch.equal(fit(settings, rows())(rows(seed=1)), quantizer(rows(seed=1)))


def test_the_defaults_are_those_of_pretraining() -> None:
    made, default = quantizer_settings(TargetSettings(kind="random")), QuantizerSettings()
    assert made == QuantizerSettings(refine_window=1)
    assert quantizer_settings(TargetSettings(kind="pca")).whitening == default.whitening
    assert TargetSettings(kind="kmeans").with_defaults().seed == 0


def test_k_means_of_rows_is_that_of_the_teacher() -> None:
    for kind in ("kmeans", "mfcc"):
        codes = fit(TargetSettings(kind=kind, clusters=20, seed=4), rows())(rows(seed=1))
        assert torch.equal(codes[:, 0], nearest_cluster(rows(seed=1), estimate_clusters(rows(), 20, seed=4)))


def test_refined_codes_are_nearer_to_the_rows_than_random_ones() -> None:
    nearest = []
    for count in (1, 8):
        quantizer = fit(TargetSettings(kind="refined", codebook_size=30, codebook_dim=6, refinements=count), rows())
        assert isinstance(quantizer, RandomProjectionQuantizer)
        nearest.append(float((quantizer.project(rows())[0] @ quantizer.codebook[0].T).max(dim=1).values.mean()))
    assert nearest[1] > nearest[0] + 0.002


def test_codes_of_every_fitted_kind_are_in_range_and_do_not_depend_on_the_rows_beside() -> None:
    for kind in ("random", "pca", "refined", "kmeans", "mfcc"):
        size = {"clusters": 20} if kind in ("kmeans", "mfcc") else {"codebook_size": 20}
        function = fit(TargetSettings(kind=kind, **size), rows())
        codes = function(rows(seed=3))
        assert codes.shape == (600, 1) and codes.min() >= 0 and codes.max() < 20, kind
        assert torch.equal(function(rows(seed=3)[100:200]), codes[100:200]), kind


def test_codebooks_of_refined_targets_differ() -> None:
    codes = fit(TargetSettings(kind="refined", codebook_size=30, num_codebooks=2), rows())(rows())
    assert codes.shape == (600, 2) and not torch.equal(codes[:, 0], codes[:, 1])


def test_cepstra_are_a_cosine_transform_with_slopes() -> None:
    log_mel = torch.arange(12.0)[:, None] * torch.ones(1, 80)
    values = cepstra(log_mel)
    assert values.shape == (12, 39)
    torch.testing.assert_close(values[:, 0], torch.arange(12.0) * 80**0.5)
    torch.testing.assert_close(values[:, 1:13], torch.zeros(12, 12), atol=1e-3, rtol=0)
    torch.testing.assert_close(values[4:8, 13], torch.full((4,), 80**0.5))  # slope per frame
    torch.testing.assert_close(values[5:7, 26], torch.zeros(2), atol=1e-4, rtol=0)


def test_errors_name_the_field_and_the_fix() -> None:
    with pytest.raises(UserError, match="clusters,export=FOLDER"):
        TargetSettings(kind="clusters")
    for kind, field, value in (("pca", "export", "x"), ("mfcc", "num_codebooks", 2), ("kmeans", "codebook_size", 9),
                               ("random", "whitening", 1.0)):  # fmt: skip
        with pytest.raises(UserError, match=f"kind '{kind}' has {field}={value}, which has no effect"):
            TargetSettings(kind=kind, **{field: value})
    with pytest.raises(UserError, match="whitening=1.0, but projection=random"):
        TargetSettings(kind="refined", whitening=1.0, projection="random")
    for settings in (TargetSettings(kind="kmeans", clusters=700), TargetSettings(kind="refined", codebook_size=700)):
        with pytest.raises(UserError, match="has 700 codes, but is fitted on 600 frames"):
            fit(settings, rows())
    with pytest.raises(UserError, match="codebook_dim is 99"):
        fit(TargetSettings(kind="pca", codebook_dim=99), rows())
