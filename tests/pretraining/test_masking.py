"""Span masks and noise: shares, lengths, borders, and their dependence on the segment's seed only."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from bestrq.pretraining.hashed_noise import hashed_noise
from bestrq.pretraining.masking import (
    MaskingSettings,
    draw_span_mask,
    fill_with_noise,
    num_runs,
)
from common.config import parse
from common.errors import UserError
from common.segments import Segments


def expected_mask_share(frames: int, span_frames: int, start_probability: float) -> float:
    """Closed form of the masked share of a segment: frame i is masked unless no span that covers it starts."""
    i = np.arange(frames)
    first_start = np.maximum(i - span_frames + 1, 0)
    last_start = np.minimum(i, frames - span_frames)
    covering = np.maximum(last_start - first_start + 1, 0)
    return float((1 - (1 - start_probability) ** covering).mean())


@pytest.mark.parametrize(("frames", "start_probability"), [(40, 0.4), (41, 0.3), (250, 0.02), (1600, 0.01)])
def test_realised_share_is_that_of_the_closed_form(frames, start_probability):
    generator = np.random.default_rng(0)
    rows = 8_000_000 // max(frames, 200)
    masked = sum(int(draw_span_mask(generator, frames, 40, start_probability).sum()) for _ in range(rows))
    assert masked / (rows * frames) == pytest.approx(expected_mask_share(frames, 40, start_probability), rel=0.01)


def test_closed_form_of_a_long_segment_is_the_papers_third():
    assert expected_mask_share(100_000, 40, 0.01) == pytest.approx(1 - 0.99**40, rel=1e-3)


def runs(mask: np.ndarray) -> list[int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return list(edges[1::2] - edges[::2])


@pytest.mark.parametrize("span", [1, 7, 40])
def test_masks_are_unions_of_whole_spans(span):
    generator = np.random.default_rng(1)
    for frames in [0, span - 1, span, span + 1, 500]:
        mask = draw_span_mask(generator, frames, span, 0.05)
        assert mask.shape == (frames,) and mask.dtype == bool
        assert all(length >= span for length in runs(mask))


@pytest.mark.parametrize("span", [1, 7, 40])
def test_a_mask_is_the_union_of_the_spans_that_its_generator_starts(span):
    for frames in [0, span - 1, span, span + 1, 500]:
        for probability in (0.01, 0.3):
            starts = np.random.default_rng(3).random(max(0, frames - span + 1), dtype=np.float32) < probability
            union = np.zeros(frames, dtype=bool)
            for start in np.flatnonzero(starts):
                union[start : start + span] = True
            assert np.array_equal(draw_span_mask(np.random.default_rng(3), frames, span, probability), union)


def test_a_single_span_is_exactly_400_ms():
    class OneStart:
        def random(self, n, dtype):
            return np.where(np.arange(n) == 17, 0.0, 1.0).astype(dtype)

    mask = draw_span_mask(OneStart(), 300, 40, 0.01)  # type: ignore[arg-type]
    assert np.flatnonzero(mask).tolist() == list(range(17, 57))


def fill_with_hashed_noise(log_mel, mask, segments, noise_std):
    """`fill_with_noise` as on a GPU."""
    return torch.where(mask[..., None], noise_std * hashed_noise(segments, log_mel), log_mel)


FILLS = pytest.mark.parametrize("fill", [fill_with_noise, fill_with_hashed_noise])


@FILLS
def test_noise_depends_on_the_segments_seed_only(fill):
    """The same segment in another row, at another position, beside another segment, gets the same noise."""
    log_mel = torch.ones(2, 40, 5)
    mask = torch.ones(2, 40, dtype=torch.bool)
    starts, lengths = torch.tensor([[0, 16], [8, 0]]), torch.tensor([[10, 12], [12, 0]])
    seeds = torch.tensor([[3, 11], [11, 0]])
    filled = fill(log_mel, mask, Segments(starts, lengths, 40, seeds), 0.1)
    assert torch.equal(filled[0, 16:28], filled[1, 8:20])
    assert not torch.equal(filled[0, :10], filled[0, 16:26])


@FILLS
def test_noise_has_the_given_deviation_and_unmasked_frames_stay(fill):
    log_mel = torch.full((1, 4000, 80), 3.0)
    mask = torch.arange(4000).unsqueeze(0) < 2000
    segments = Segments(torch.tensor([[0]]), torch.tensor([[4000]]), 4000, torch.tensor([[5]]))
    filled = fill(log_mel, mask, segments, 0.1)
    assert torch.equal(filled[:, 2000:], log_mel[:, 2000:])
    assert filled[:, :2000].std().item() == pytest.approx(0.1, rel=0.02)
    assert filled[:, :2000].mean().item() == pytest.approx(0.0, abs=2e-3)


@FILLS
def test_every_masked_frame_has_noise_of_its_own(fill):
    """No vector is shared by the frames of a step or of a run, which the encoder could learn as a sign of the mask."""
    mask = torch.ones(1, 40, dtype=torch.bool)
    segments = Segments(torch.tensor([[0]]), torch.tensor([[40]]), 40, torch.tensor([[5]]))
    filled = fill(torch.zeros(1, 40, 80), mask, segments, 0.1)[0]
    assert len(filled.unique(dim=0)) == 40
    assert torch.corrcoef(filled).fill_diagonal_(0).abs().max() < 0.6


def test_hashed_noise_is_normal_and_independent_between_frames_bins_and_segments():
    segments = Segments(torch.tensor([[0, 2000]]), torch.tensor([[2000, 2000]]), 4000, torch.tensor([[5, 6]]))
    noise = hashed_noise(segments, torch.zeros(1, 4000, 80))[0].double()
    assert noise.isfinite().all()
    for value in (-3.0, -1.0, 0.0, 0.5, 2.0):
        expected = 0.5 * (1 + math.erf(value / math.sqrt(2)))
        error = math.sqrt(expected * (1 - expected) / noise.numel())
        assert abs((noise < value).double().mean() - expected) < 5 * error
    for first, second in (
        (noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[:2000], noise[2000:]), (noise**2, noise)
    ):  # fmt: skip
        assert abs(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1]) < 0.012


def test_every_frame_of_a_segment_is_masked_in_some_draw():
    """The tail of a long segment too: masks are drawn for the whole of it, not within the shortest of the batch."""
    generator = np.random.default_rng(2)
    for frames in (40, 41, 300):
        masked = sum(draw_span_mask(generator, frames, 40, 0.02).astype(int) for _ in range(3000))
        assert np.all(masked > 0)


def test_num_runs():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    assert num_runs(mask) == 3


@dataclass
class Config:
    masking: MaskingSettings = field(default_factory=MaskingSettings)


@pytest.mark.parametrize(("name", "value"), [("start_probability", 1.5), ("span_ms", 1), ("noise_std", -1.0)])
def test_bad_settings_name_the_field(name, value):
    with pytest.raises(UserError, match=f"masking.{name} is {value}: (expected|give)"):
        parse(Config, [f"--masking.{name}={value}"])
