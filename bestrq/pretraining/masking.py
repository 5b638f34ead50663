"""Span masks, and the noise that replaces masked frames.

Chiu et al. 2022, "Self-supervised learning with random-projection quantizer for speech recognition" (arXiv 2202.01855),
section 3: every 10 ms frame starts a span of 400 ms with probability 0.01, spans may overlap, and masked frames become
N(0, 0.1) noise. "Mask probability" has a different meaning in every toolkit, so spans are given in milliseconds with a
start probability per mel frame, and the realised share of masked frames is logged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt
from torch import Tensor

from common.errors import UserError
from common.segments import Segments


@dataclass
class MaskingSettings:
    """Span masking. The defaults mask about a third of the frames of a long segment: 1 - 0.99^40."""

    span_ms: int = 400
    """length of a span in milliseconds"""
    start_probability: OpenUnitInterval = 0.01
    """probability that a mel frame starts a span"""
    noise_std: NonNegativeFloat = 0.1
    """standard deviation of the noise in masked frames (features have zero mean and unit variance)"""
    bands: NonNegativeInt = 0
    """masks over mel bins per segment of the model's input; targets stay clean (SpecAugment, arXiv 1904.08779)"""
    band_mels: PositiveInt = 10
    """largest width of such a mask, in mel bins; widths are uniform from 0"""
    mix_probability: ClosedUnitInterval = 0.0
    """probability that other speech or noise is added to part of a segment of the model's input; targets stay clean
    (WavLM, arXiv 2110.13900, section III; 0.2 in its predecessor's code)"""
    mix_noise_share: ClosedUnitInterval = 0.5
    """share of coloured noise among these; the rest is speech of another speaker"""

    def __post_init__(self) -> None:
        if self.span_ms < 10:
            raise UserError(f"masking.span_ms is {self.span_ms}: give at least one frame (10 ms), such as 400")

    def draw_function(self, hop_ms: float) -> Callable[[np.random.Generator, int], np.ndarray]:
        """`draw_span_mask` with these settings, for the loader; picklable."""
        frames = round(self.span_ms / hop_ms)
        return partial(draw_span_mask, span_frames=frames, start_probability=self.start_probability)


def draw_span_mask(
    generator: np.random.Generator, frames: int, span_frames: int, start_probability: float
) -> np.ndarray:
    """Mask of a segment, bool `[frames]`. Spans are never truncated: segments shorter than a span are not masked."""
    if frames < span_frames:
        return np.zeros(frames, dtype=bool)
    starts = generator.random(frames - span_frames + 1, dtype=np.float32) < start_probability
    # A frame is masked if one of the last `span_frames` frames starts a span: a difference of running sums.
    started = np.zeros(span_frames + frames, dtype=np.int32)
    end = span_frames + len(starts)
    np.add.accumulate(starts, dtype=np.int32, out=started[span_frames:end])
    started[end:] = started[end - 1]
    return started[span_frames:] > started[:frames]


def num_runs(mask: Tensor) -> int:
    """Number of runs of masked frames in bool `[R, F]` on the CPU; overlapping spans form one run."""
    masked = mask.numpy()  # its counts take a tenth of the time
    return int(np.count_nonzero(masked[:, 1:] > masked[:, :-1]) + np.count_nonzero(masked[:, 0]))


def fill_with_noise(log_mel: Tensor, mask: Tensor, segments: Segments, noise_std: float) -> Tensor:
    """Copy of `[R, F, M]` with N(0, noise_std) noise in the masked frames.

    The noise of a segment is a pure function of its seed, its mask and the kind of device, so it is independent of row,
    rank, and resumed steps. The segments must have seeds.
    """
    assert segments.seed is not None
    if log_mel.device.type != "cpu":  # a loop over the segments would launch a kernel for each
        from bestrq.pretraining.hashed_noise import hashed_noise  # imported only for devices

        return torch.where(mask.unsqueeze(-1), noise_std * hashed_noise(segments, log_mel), log_mel)
    noisy, masked = log_mel.clone(), mask.numpy()
    generator = torch.Generator()
    for row, slot, start, stop in segments.used():
        frames = torch.from_numpy(start + masked[row, start:stop].nonzero()[0])
        generator.manual_seed(int(segments.seed[row, slot]))
        noise = log_mel.new_empty(len(frames), log_mel.shape[2])
        noisy[row, frames] = noise.normal_(std=noise_std, generator=generator)
    return noisy
