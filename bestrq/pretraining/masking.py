"""Which frames are hidden from the encoder, and what stands in their place.

Chiu et al. 2022 (arXiv 2202.01855), section 3: every 10 ms frame starts a span of 400 ms with probability 0.01, spans
may overlap, and masked frames become N(0, 0.1) noise. A span is given in milliseconds and a start probability is per
mel frame, since "mask probability" means four different things in four toolkits; what was masked is logged.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.segments import Segments


@dataclass
class MaskingSettings:
    """Span masking. With the defaults about a third of the frames of a long segment are masked: 1 - 0.99^40."""

    span_ms: int = 400
    """length of every masked span"""
    start_probability: float = 0.01
    """probability that a mel frame starts a span"""
    noise_std: float = 0.1
    """standard deviation of the noise that replaces masked frames (features have zero mean and unit variance)"""

    def __post_init__(self) -> None:
        if not 0 < self.start_probability < 1:
            raise UserError(
                f"masking.start_probability is {self.start_probability}: give a probability in (0, 1), such as 0.01"
            )
        if self.span_ms < 10:
            raise UserError(f"masking.span_ms is {self.span_ms}: give at least one frame (10 ms), such as 400")
        if self.noise_std < 0:
            raise UserError(f"masking.noise_std is {self.noise_std}: give 0 or more, such as 0.1")


def draw_span_mask(
    generator: np.random.Generator, frames: int, span_frames: int, start_probability: float
) -> np.ndarray:
    """Mask of one segment, bool `[frames]`: whole spans only, so a segment shorter than a span stays unmasked."""
    if frames < span_frames:
        return np.zeros(frames, dtype=bool)
    starts = generator.random(frames - span_frames + 1, dtype=np.float32) < start_probability
    # A frame is masked if a span started in its last `span_frames` frames: a running sum, without a loop over spans.
    started = np.zeros(span_frames + frames, dtype=np.int32)
    end = span_frames + len(starts)
    np.add.accumulate(starts, dtype=np.int32, out=started[span_frames:end])
    started[end:] = started[end - 1]
    return started[span_frames:] > started[:frames]


def expected_mask_share(frames: int, span_frames: int, start_probability: float) -> float:
    """Closed form of the masked share of a segment: frame i is masked unless none of the spans that cover it starts."""
    i = np.arange(frames)
    first_start = np.maximum(i - span_frames + 1, 0)
    last_start = np.minimum(i, frames - span_frames)
    covering = np.maximum(last_start - first_start + 1, 0)
    return float((1 - (1 - start_probability) ** covering).mean()) if frames else 0.0


def num_runs(mask: Tensor) -> int:
    """Masked runs of bool `[R, F]`; overlapping spans are one run."""
    begins = mask[:, 1:] & ~mask[:, :-1]
    return int(begins.sum() + mask[:, 0].sum())


def fill_with_noise(log_mel: Tensor, mask: Tensor, segments: Segments, noise_std: float) -> Tensor:
    """Replace masked frames of `[R, F, M]` by N(0, noise_std) noise.

    The noise of a segment is a pure function of its seed, so it does not depend on the row, the rank, or the step at
    which a run was interrupted. The segments need seeds.
    """
    assert segments.seed is not None
    noise = torch.zeros_like(log_mel)
    generator = torch.Generator(log_mel.device)
    for row, slot, start, stop in segments.used():
        generator.manual_seed(int(segments.seed[row, slot]))
        noise[row, start:stop].normal_(std=noise_std, generator=generator)
    return torch.where(mask.unsqueeze(-1), noise, log_mel)
