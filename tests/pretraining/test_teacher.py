"""Targets of a trained model: clusters, CTC labels and distributions, whatever shares their row."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.pretraining.clustering import estimate_clusters, nearest_cluster, updated_centroids
from bestrq.pretraining.teacher import Teacher, nearest_label
from bestrq.recognition.ctc import CTCModel
from bestrq.training.process import World
from common.errors import UserError
from common.segments import Segments
from tests.gloo import run_distributed

MELS, CLASSES = 12, 7
ENCODER = EncoderSettings(
    num_mels=MELS, dim=16, num_layers=3, num_heads=2, feedforward_dim=24, kernel_size=5, subsampling_channels=6
)
LENGTHS = [23, 41, 16]


def make_teacher(kind: str, fill: bool = True) -> Teacher:
    """With dropout in its settings, which evaluation mode turns off. Its outputs are centred, so that targets vary."""
    torch.manual_seed(0)
    encoder = ConformerEncoder(ENCODER).eval().requires_grad_(False)
    log_mel = torch.randn(1, 400, MELS)
    layer = 2 if kind == "clusters" else 3
    sample = Teacher(encoder, layer, CLASSES, "").sample(
        log_mel, Segments(torch.zeros(1, 1).long(), torch.tensor([[400]]), 400)
    )
    mean, inverse_std = sample.mean(dim=0), 1 / sample.std(dim=0)
    if kind == "clusters":
        centroids = torch.randn(CLASSES, 16)
        return Teacher(encoder, layer, CLASSES, "", mean=mean, inverse_std=inverse_std, centroids=centroids)
    weight = torch.randn(CLASSES, 16) * inverse_std
    bias = -weight @ mean + 3 * (torch.arange(CLASSES) == 0)  # the blank is the most probable label
    return Teacher(encoder, layer, CLASSES, "", head=(weight, bias), soft=kind == "soft", fill=fill)


def utterance(number: int) -> torch.Tensor:
    return torch.randn(LENGTHS[number], MELS, generator=torch.Generator().manual_seed(number))


def row(frames: int, members: list[tuple[int, int]]) -> tuple[torch.Tensor, Segments]:
    """A row with utterances at these first frames, and noise in its gaps."""
    log_mel = 50 * torch.randn(1, frames, MELS, generator=torch.Generator().manual_seed(77))
    for number, start in members:
        log_mel[0, start : start + LENGTHS[number]] = utterance(number)
    starts = torch.tensor([[start for _, start in members] + [0]])
    lengths = torch.tensor([[LENGTHS[number] for number, _ in members] + [0]])
    return log_mel, Segments(starts, lengths, frames)


@pytest.mark.parametrize("kind", ["clusters", "hard", "soft"])
def test_targets_of_a_segment_are_the_same_alone_and_packed(kind: str) -> None:
    teacher = make_teacher(kind)
    packed = teacher(*row(96, [(1, 4), (2, 52), (0, 72)]))
    found = set()
    for number, start in ((1, 4), (2, 52), (0, 72)):
        frames = -(-LENGTHS[number] // 4)
        alone = teacher(*row(4 * frames, [(number, 0)]))[:frames]
        torch.testing.assert_close(packed[start // 4 : start // 4 + frames], alone, rtol=1e-4, atol=1e-5)
        found |= set(alone.flatten().tolist())
    assert len(found) > 2 and not packed.requires_grad
    if kind == "soft":
        torch.testing.assert_close(packed.sum(dim=1), torch.ones(24))


def naive_nearest(labels: list[int], segments: list[tuple[int, int]]) -> list[int]:
    nearest = list(range(len(labels)))
    for start, stop in segments:
        candidates = [t for t in range(start, stop) if labels[t]]
        for t in range(start, stop):
            if candidates:
                nearest[t] = min(candidates, key=lambda other: (abs(other - t), other))
    return nearest


def test_blanks_are_filled_from_the_nearest_label_of_their_own_segment() -> None:
    generator = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.3, 1.0):
        for _ in range(30):
            labels = (generator.random((2, 20)) < share) * generator.integers(1, 5, (2, 20))
            starts, lengths = torch.tensor([[0, 32], [8, 0]]), torch.tensor([[22, 45], [61, 0]])  # mel frames
            places = [[(0, 6), (8, 20)], [(2, 18)]]  # 22 frames are 6 encoder frames, 45 are 12, 61 are 16
            expected = [[20 * r + t for t in naive_nearest(labels[r].tolist(), places[r])] for r in range(2)]
            segments = Segments(starts, lengths, 80)
            assert nearest_label(torch.from_numpy(labels), segments, 4).tolist() == expected


@pytest.mark.parametrize("output", ["last", "weighted_sum"])
def test_distributions_are_those_of_the_ctc_model_for_every_output_of_its_encoder(
    output: Literal["last", "weighted_sum"],
) -> None:
    model = CTCModel(replace(ENCODER, output=output), CLASSES).eval().requires_grad_(False)
    head = model.head.weight, model.head.bias
    teacher = Teacher(model.encoder, len(model.encoder.blocks), CLASSES, "", head=head, soft=True, fill=False)
    rows = row(96, [(1, 4), (2, 52), (0, 72)])
    torch.testing.assert_close(teacher(*rows), model.log_probs(*rows).exp().flatten(0, 1))


def test_with_fill_no_frame_of_a_segment_with_labels_keeps_the_blank() -> None:
    rows = row(96, [(1, 4), (2, 52), (0, 72)])
    kept, filled = make_teacher("hard", fill=False)(*rows), make_teacher("hard")(*rows)
    assert (kept[1:12] == 0).any() and not (filled[1:12] == 0).any()
    assert torch.equal(filled[kept != 0], kept[kept != 0])
    soft, soft_filled = make_teacher("soft", fill=False)(*rows), make_teacher("soft")(*rows)
    assert torch.equal(soft.argmax(dim=1), kept)
    assert torch.equal(soft_filled.argmax(dim=1)[1:12], filled[1:12])


def test_without_the_blank_every_frame_has_its_most_probable_label() -> None:
    rows = row(96, [(1, 4), (2, 52), (0, 72)])
    kept, soft = make_teacher("hard", fill=False), make_teacher("soft", fill=False)
    distributions = soft(*rows)
    kept.exclude_blank = soft.exclude_blank = True
    assert torch.equal(kept(*rows), distributions[:, 1:].argmax(dim=1) + 1)
    expected = distributions[:, 1:] / distributions[:, 1:].sum(dim=1, keepdim=True)
    torch.testing.assert_close(soft(*rows)[:, 1:], expected)
    assert not soft(*rows)[:, 0].any()


def blobs(per_cluster: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    centres = 10 * torch.randn(CLASSES, 16, generator=generator)
    labels = torch.arange(CLASSES).repeat(per_cluster)
    return centres[labels] + torch.randn(len(labels), 16, generator=generator), labels


def test_clusters_of_separate_blobs_are_the_blobs() -> None:
    points, labels = blobs()
    centroids = estimate_clusters(points, CLASSES, seed=1)
    found = nearest_cluster(points, centroids)
    assert len({(a, b) for a, b in zip(labels.tolist(), found.tolist(), strict=True)}) == CLASSES
    for cluster in range(CLASSES):
        torch.testing.assert_close(centroids[cluster], points[found == cluster].mean(dim=0), rtol=1e-4, atol=1e-4)


def test_the_nearest_cluster_is_that_of_the_smallest_distance_in_float64() -> None:
    points, centroids = torch.randn(300, 16), 3 * torch.randn(50, 16)
    expected = torch.cdist(points.double(), centroids.double()).argmin(dim=1)
    assert torch.equal(nearest_cluster(points, centroids), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_cluster(points, centroids), expected)


def test_the_error_of_k_means_falls_and_no_cluster_stays_empty(capsys: pytest.CaptureFixture[str]) -> None:
    points = torch.randn(400, 8, generator=torch.Generator().manual_seed(2))
    points[:200] = points[0]  # more clusters than distinct points nearby
    centroids = estimate_clusters(points, 60, seed=3)
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) > 2 and errors == sorted(errors, reverse=True)
    assert nearest_cluster(points, centroids).unique().numel() > 55
    assert torch.equal(centroids, estimate_clusters(points, 60, seed=3))
    assert not torch.equal(centroids, estimate_clusters(points, 60, seed=4))


def test_an_empty_cluster_restarts_at_the_point_that_is_farthest_from_its_centroid() -> None:
    points = torch.tensor([[0.0, 0], [2, 0], [10, 0], [20, 0]])
    labels, distances = torch.tensor([0, 0, 3, 3]), torch.tensor([1.0, 1, 30, 20])
    centroids = updated_centroids(points, labels, distances, 4)
    assert centroids.tolist() == [[1, 0], [10, 0], [20, 0], [15, 0]]


def estimate(world: World) -> list[torch.Tensor]:
    teacher = make_teacher("clusters")
    rows = [row(96, [(1, 4), (2, 52), (0, 72)])] if world.is_main else []
    teacher.estimate(rows, 3, world)
    return list(teacher.tensors().values())


def test_clusters_are_those_of_normalised_outputs_at_frames_of_segments_on_all_ranks() -> None:
    alone = estimate(World())
    for ranks in run_distributed(estimate, 2):
        assert all(torch.equal(a, b) for a, b in zip(alone, ranks, strict=True))
    teacher = make_teacher("clusters")
    log_mel, segments = row(96, [(1, 4), (2, 52), (0, 72)])
    valid = [*range(1, 12), *range(13, 17), *range(18, 24)]
    outputs = teacher.outputs(log_mel, segments)[0, valid]
    mean, inverse_std, _ = alone
    torch.testing.assert_close(mean, outputs.mean(dim=0))
    torch.testing.assert_close(1 / inverse_std, outputs.std(dim=0, correction=0))


def test_too_little_audio_for_the_clusters_is_an_error_with_a_fix() -> None:
    teacher = make_teacher("clusters")
    teacher.classes = 100
    with pytest.raises(UserError, match=r"targets.clusters is 100, but the sample has 21 frames: raise"):
        teacher.estimate([row(96, [(1, 4), (2, 52), (0, 72)])], 3, World())
