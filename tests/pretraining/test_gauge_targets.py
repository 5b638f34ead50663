"""Targets of the gauge against plain references."""

import numpy as np
import pytest
import torch

from bestrq.pretraining.gauge_targets import (
    TargetSettings,
    cepstra,
    fill_blanks,
    fit,
    kmeans,
    nearest_centres,
    nearest_directions,
    pca,
    spherical_kmeans,
)
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


def test_pca_equals_the_singular_value_decomposition() -> None:
    x = rows().double().numpy()
    centred = x - x.mean(axis=0)
    _, scale, components = np.linalg.svd(centred, full_matrices=False)
    for whiten in (0.0, 0.5, 1.0):
        mean, matrix = pca(rows(), 6, whiten)
        expected = components[:6].T * (scale[:6] / len(x) ** 0.5) ** -whiten
        expected = expected * np.sign((expected * matrix.numpy()).sum(axis=0))
        np.testing.assert_allclose(matrix, expected, atol=2e-5)
        np.testing.assert_allclose(mean, x.mean(axis=0), atol=1e-5)


def test_whitened_components_have_unit_covariance() -> None:
    mean, matrix = pca(rows(), 8, 1.0)
    projected = (rows() - mean) @ matrix
    torch.testing.assert_close(projected.T @ projected / len(projected), torch.eye(8), atol=1e-3, rtol=0)


def test_nearest_codes_equal_a_search_over_all_distances() -> None:
    x, centres = rows().double(), rows(40, seed=2).double()
    assert torch.equal(nearest_centres(x, centres), torch.cdist(x, centres).argmin(dim=1))
    unit = torch.nn.functional.normalize(centres, dim=1)
    cosines = torch.nn.functional.cosine_similarity(x[:, None], unit[None], dim=2)
    assert torch.equal(nearest_directions(x, unit), cosines.argmax(dim=1))


def test_kmeans_finds_separate_clusters_and_never_raises_the_distance() -> None:
    generator = torch.Generator().manual_seed(1)
    places = 50 * torch.randn(5, 8, generator=generator)
    x = places.repeat_interleave(40, dim=0) + torch.randn(200, 8, generator=generator)
    distances = [torch.cdist(x, kmeans(x, 12, steps, 3)).min(dim=1).values.square().sum() for steps in range(1, 8)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in zip(distances, distances[1:], strict=False))
    codes = nearest_centres(x, kmeans(x, 12, 10, 3)).view(5, 40)
    assert all(not set(codes[a].tolist()) & set(codes[b].tolist()) for a in range(5) for b in range(a))


def test_spherical_kmeans_gives_normalised_means_and_keeps_unused_codes() -> None:
    x = torch.nn.functional.normalize((rows() - 3).abs(), dim=1)
    start = torch.nn.functional.normalize(torch.cat([(rows(7, seed=4) - 3).abs(), -torch.ones(1, 24)]), dim=1)
    codes = spherical_kmeans(x, start, 1)
    assigned = (x @ start.T).argmax(dim=1)
    assert 7 not in assigned
    for code in range(len(start)):
        inside = x[assigned == code]
        expected = inside.mean(dim=0) / inside.mean(dim=0).norm() if len(inside) else start[code]
        torch.testing.assert_close(codes[code], expected, atol=1e-5, rtol=0)


def test_refined_codes_are_nearer_to_the_rows_than_random_ones() -> None:
    mean, matrix = pca(rows(), 6, 1.0)
    projected = torch.nn.functional.normalize((rows() - mean) @ matrix, dim=1)
    start = torch.nn.functional.normalize(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    refined = spherical_kmeans(projected, start, 8)
    assert (projected @ refined.T).max(dim=1).values.mean() > (projected @ start.T).max(dim=1).values.mean() + 0.02


def test_codes_of_every_fitted_kind_are_in_range_and_do_not_depend_on_the_rows_beside() -> None:
    for kind in ("random", "pca", "refined", "kmeans", "mfcc", "layer"):
        settings = TargetSettings(kind=kind, codebook_size=20, export="x" if kind == "layer" else "")
        function = fit(settings, rows())
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


@pytest.mark.parametrize("labels, filled", [
    ([0, 0, 3, 0, 0, 0, 5, 0], [3, 3, 3, 3, 3, 5, 5, 5]),
    ([0, 0, 0], [0, 0, 0]),
    ([2], [2]),
])  # fmt: skip
def test_blanks_take_the_nearest_label(labels: list[int], filled: list[int]) -> None:
    assert fill_blanks(torch.tensor(labels)).tolist() == filled


def test_errors_name_the_field_and_the_fix() -> None:
    with pytest.raises(UserError, match="layer,export=FOLDER"):
        TargetSettings(kind="layer")
    with pytest.raises(UserError, match="export=x, which only"):
        TargetSettings(kind="pca", export="x")
    with pytest.raises(UserError, match="num_codebooks is 2"):
        TargetSettings(kind="mfcc", num_codebooks=2)
    with pytest.raises(UserError, match="codebook_size is 700, but the targets are fitted on 600 frames"):
        fit(TargetSettings(kind="kmeans", codebook_size=700), rows())
    with pytest.raises(UserError, match="codebook_dim is 99"):
        fit(TargetSettings(kind="pca", codebook_dim=99), rows())
