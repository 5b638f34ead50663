"""SpecAugment: sizes and positions of the masks, and frames outside the segments."""

import pytest
import torch

from bestrq.recognition.spec_augment import SpecAugmentSettings, spec_augment
from common.segments import Segments


def rows(segments: list[list[tuple[int, int, int]]], num_frames: int, num_mels: int = 20):
    """Rows of ones; each segment is (start, length, seed)."""
    slots = max(len(row) for row in segments)
    padded = torch.tensor([row + [(0, 0, 0)] * (slots - len(row)) for row in segments])
    log_mel = torch.ones(len(segments), num_frames, num_mels)
    return log_mel, Segments(padded[..., 0], padded[..., 1], num_frames, padded[..., 2])


def test_masks_are_a_function_of_the_segment_seed_alone() -> None:
    settings = SpecAugmentSettings(max_freq_width=6)
    alone = spec_augment(*rows([[(0, 300, 7)]], 300), settings)
    packed = spec_augment(*rows([[(0, 80, 1), (100, 300, 7)], [(40, 360, 2)]], 400), settings)
    assert torch.equal(packed[0, 100:400], alone[0])
    other_seed = spec_augment(*rows([[(0, 300, 8)]], 300), settings)
    assert not torch.equal(alone, other_seed)


@pytest.mark.parametrize("settings", [
    SpecAugmentSettings(num_time_masks=0, max_freq_width=20, num_freq_masks=5),
    SpecAugmentSettings(num_freq_masks=0, num_time_masks=30, max_time_share=0.5),
])  # fmt: skip
def test_masks_stay_within_their_segment(settings: SpecAugmentSettings) -> None:
    # Frames before, between and after segments must not change, nor those of unused slots.
    for seed in range(50):
        log_mel, segments = rows([[(10, 40, seed), (52, 30, seed + 1)], [(60, 40, seed)]], 100)
        changed = (spec_augment(log_mel, segments, settings) == 0).any(dim=2)
        assert not changed[0, :10].any() and not changed[0, 50:52].any() and not changed[0, 82:].any()
        assert not changed[1, :60].any()
        assert changed.any()


def test_the_input_is_not_modified_and_zero_masks_change_nothing() -> None:
    log_mel, segments = rows([[(0, 200, 3)]], 200)
    masked = spec_augment(log_mel, segments, SpecAugmentSettings())
    assert (log_mel == 1).all() and (masked == 0).any()
    unmasked = spec_augment(log_mel, segments, SpecAugmentSettings(num_freq_masks=0, num_time_masks=0))
    assert torch.equal(unmasked, log_mel)


def test_a_frequency_mask_and_a_time_mask_have_the_widths_and_positions_of_the_paper() -> None:
    count = 4000
    frequency = SpecAugmentSettings(num_freq_masks=1, max_freq_width=4, num_time_masks=0)
    log_mel, segments = rows([[(0, 50, seed)] for seed in range(count)], 50)
    band = spec_augment(log_mel, segments, frequency)[:, 0] == 0  # [count, M]
    widths = band.sum(dim=1)
    # Uniform on 0..4: a fifth each, within 4 standard deviations of a count of 4000.
    assert all(abs(int(n) - count / 5) < 4 * (count * 0.16) ** 0.5 for n in widths.bincount(minlength=5))
    assert band.any(dim=0).all()  # every bin can be masked, including the first and the last
    steps = band.int().diff(dim=1, prepend=torch.zeros(count, 1), append=torch.zeros(count, 1))
    assert (steps == 1).sum(dim=1).max() == 1  # one contiguous band

    time = SpecAugmentSettings(num_freq_masks=0, num_time_masks=1, max_time_width=100, max_time_share=0.2)
    span = spec_augment(log_mel, segments, time)[:, :, 0] == 0  # [count, F]
    widths = span.sum(dim=1)
    assert widths.max() == 10 and widths.min() == 0  # a fifth of 50 frames, not 100
    assert abs(float(widths.double().mean()) - 5.0) < 4 * 10**0.5 / count**0.5
    assert span[:, 0].any() and span[:, -1].any()


def test_longer_segments_get_more_time_masks() -> None:
    settings = SpecAugmentSettings(
        num_freq_masks=0, num_time_masks=2, time_mask_period=100, max_time_width=5, max_time_share=1.0
    )

    def mean_spans(length: int) -> float:
        log_mel, segments = rows([[(0, length, seed)] for seed in range(300)], length)
        masked = spec_augment(log_mel, segments, settings)[:, :, 0] == 0
        edges = masked.int().diff(dim=1, prepend=torch.zeros(300, 1))
        return float((edges == 1).sum()) / 300

    # 2 and 20 spans, of which 1 in 6 has width 0 and some touch.
    assert 1.5 < mean_spans(100) < 1.7
    assert 14.5 < mean_spans(1000) < 16.7


def test_the_adaptive_number_of_time_masks_is_a_share_of_the_frames_and_at_most_20() -> None:
    """Masks of one frame in long segments hardly ever overlap, so masked frames count the masks."""
    settings = SpecAugmentSettings(
        num_freq_masks=0, num_time_masks=0, time_masks_per_frame=0.01, max_time_width=1, max_time_share=1.0
    )

    def masked_frames(length: int) -> list[int]:
        log_mel, segments = rows([[(0, length, seed)] for seed in range(200)], length, num_mels=1)
        return (spec_augment(log_mel, segments, settings) == 0).sum(dim=(1, 2)).tolist()

    assert max(masked_frames(199)) == 1 and max(masked_frames(99)) == 0
    assert sum(masked_frames(1000)) / 200 == pytest.approx(5, rel=0.1)  # 10 masks, half of them of width 0
    assert sum(masked_frames(9000)) / 200 == pytest.approx(10, rel=0.1)  # 20 masks, not 90
