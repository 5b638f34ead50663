"""SpecAugment: bands of mel bins and spans of time set to zero, drawn independently for every segment.

Sources: Park et al. 2019, "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition" (without
time warping); the number and size of time masks grow with the length as in Park et al. 2020, "SpecAugment on Large
Scale Datasets", arXiv 1912.05533.

Shapes: R rows, F mel frames per row, M mel bins, S segment slots per row, K masks per segment.
"""

from dataclasses import dataclass

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor

from common.hashing import INCREMENT, splitmix64
from common.segments import Segments

MAX_ADAPTIVE_MASKS = 20
"""largest adaptive number of time masks (Park et al. 2020)"""


@dataclass(frozen=True)
class SpecAugmentSettings:
    """Number and size of the masks on training segments."""

    num_freq_masks: NonNegativeInt = 2
    """Frequency masks per segment; 0 for none."""
    max_freq_width: NonNegativeInt = 27
    """Largest width of a frequency mask, in mel bins; widths are uniform from 0."""
    num_time_masks: NonNegativeInt = 2
    """Time masks per time_mask_period of a segment, rounded up; 0 for none."""
    time_mask_period: PositiveInt = 1000
    """Mel frames per num_time_masks time masks (1000 frames are 10 s at a hop of 10 ms)."""
    time_masks_per_frame: ClosedUnitInterval = 0.0
    """Adaptive number of time masks (p_M of Park et al. 2020): masks per mel frame of a segment, rounded down, at most
    20, in place of num_time_masks; 0 disables it."""
    max_time_width: NonNegativeInt = 100
    """Largest width of a time mask, in mel frames; widths are uniform from 0."""
    max_time_share: ClosedUnitInterval = 0.2
    """Largest width of a time mask, as a share of its segment. With a large max_time_width, this is the adaptive size
    (p_S of Park et al. 2020; 0.05 with ten masks in Gulati et al. 2020)."""
    start_step: NonNegativeInt = 0
    """Steps of the run before the first masks. With few labels, a model from scratch may never align speech and text if
    its input is masked from the beginning (docs/learning.md)."""


def spec_augment(log_mel: Tensor, segments: Segments, settings: SpecAugmentSettings) -> Tensor:
    """Copy of `log_mel` with the masks of every segment set to 0, the mean of normalised features.

    The masks of a segment are a pure function of its seed, its length and the settings. They do not depend on its row,
    the device or earlier random numbers.

    Args:
        log_mel: normalised features `[R, F, M]`.
        segments: in mel frames, with seeds; the segments of a row do not overlap.
    """
    device = log_mel.device
    placed = segments.to(device)
    start, length, seed = placed.start, placed.length, placed.seed
    assert seed is not None
    masked = _time_masks(log_mel.shape[1], start, length, seed, settings)[:, :, None]
    masked = masked | _freq_masks(log_mel.shape[1], log_mel.shape[2], start, length, seed, settings)
    return log_mel.masked_fill(masked, 0.0)


def _time_masks(num_frames: int, start: Tensor, length: Tensor, seed: Tensor, settings: SpecAugmentSettings) -> Tensor:
    """Masked frames, bool `[R, F]`."""
    if settings.time_masks_per_frame:
        count = (length.double() * settings.time_masks_per_frame).long().clamp(max=MAX_ADAPTIVE_MASKS)
        largest = min(MAX_ADAPTIVE_MASKS, int(num_frames * settings.time_masks_per_frame))
    else:
        count = settings.num_time_masks * (-(-length // settings.time_mask_period))
        largest = settings.num_time_masks * (-(-num_frames // settings.time_mask_period))
    mask = torch.arange(largest, device=start.device)
    limit = (length * settings.max_time_share).long().clamp(max=settings.max_time_width)
    width = _uniform(seed, 2 * mask, limit[..., None] + 1) * (mask < count[..., None])
    first = start[..., None] + _uniform(seed, 2 * mask + 1, length[..., None] - width + 1)
    return _running_sum(num_frames, first.flatten(1), (first + width).flatten(1), torch.ones_like(first).flatten(1)) > 0


def _freq_masks(
    num_frames: int, num_mels: int, start: Tensor, length: Tensor, seed: Tensor, settings: SpecAugmentSettings
) -> Tensor:
    """Masked bins of every frame, bool `[R, F, M]`."""
    draws = -1 - torch.arange(2 * settings.num_freq_masks, device=start.device)  # time masks use draws from 0 on
    width = _uniform(seed, draws[::2], torch.full((), min(settings.max_freq_width, num_mels) + 1, device=start.device))
    first = _uniform(seed, draws[1::2], num_mels - width + 1)
    bins = torch.arange(num_mels, device=start.device)
    bands = ((bins >= first[..., None]) & (bins < (first + width)[..., None])).any(dim=2)  # [R, S, M]
    outside = torch.zeros_like(bands[:, :1])
    slot = torch.arange(1, start.shape[1] + 1, device=start.device).expand_as(start)
    slot_at_frame = _running_sum(num_frames, start, start + length, slot)  # [R, F]; 0 outside segments
    index = slot_at_frame[:, :, None].expand(-1, -1, num_mels)
    return torch.cat([outside, bands], dim=1).gather(1, index)


def _running_sum(num_frames: int, first: Tensor, stop: Tensor, value: Tensor) -> Tensor:
    """Sum of the values of all intervals `[first, stop)` at each frame: int64 `[R, F]`, from int64 `[R, K]` each."""
    change = torch.zeros(first.shape[0], num_frames + 1, dtype=torch.int64, device=first.device)
    change.scatter_add_(1, first, value).scatter_add_(1, stop, -value)
    return change.cumsum(dim=1)[:, :num_frames]


def _uniform(seed: Tensor, draw: Tensor, bound: Tensor) -> Tensor:
    """Integers uniform in `[0, bound)`, int64 `[R, S, K]`: a hash of the seed `[R, S]` and the index of the draw `[K]`.

    The generator is counter-based: with a stateful generator, a mask would depend on earlier draws.
    """
    bits = splitmix64(splitmix64(seed[..., None] + 0x5BEC) + draw * INCREMENT)
    return ((bits >> 11) & ((1 << 53) - 1)) % bound
