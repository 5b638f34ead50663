"""SpecAugment: bands of mel bins and spans of time set to zero, drawn for every segment by itself.

Park et al. 2019, "SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition" (without time
warping); that the number of time masks grows with the length is from Park et al. 2020, "SpecAugment on Large Scale
Datasets".

R rows, F mel frames in a row, M mel bins, S segment slots in a row, K masks of a segment.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from common.hashing import INCREMENT, splitmix64
from common.segments import Segments


@dataclass(frozen=True)
class SpecAugmentSettings:
    """How much of a training segment SpecAugment hides."""

    num_freq_masks: int = 2
    """Bands of mel bins set to zero in every segment; 0 for none."""
    max_freq_width: int = 27
    """Widest band, in mel bins; widths are uniform from 0."""
    num_time_masks: int = 2
    """Spans of time set to zero in every begun time_mask_period of a segment; 0 for none."""
    time_mask_period: int = 1000
    """Mel frames of a segment that num_time_masks is meant for (1000 frames: 10 s at a hop of 10 ms)."""
    max_time_width: int = 100
    """Longest span, in mel frames; lengths are uniform from 0."""
    max_time_share: float = 0.2
    """A span is never longer than this share of its segment."""

    def __post_init__(self) -> None:
        for field in ("num_freq_masks", "max_freq_width", "num_time_masks", "max_time_width"):
            if getattr(self, field) < 0:
                raise UserError(f"spec_augment.{field} = {getattr(self, field)}: choose 0 (none) or more")
        if self.time_mask_period < 1:
            raise UserError(f"spec_augment.time_mask_period = {self.time_mask_period}: choose at least 1 mel frame")
        if not 0.0 <= self.max_time_share <= 1.0:
            raise UserError(f"spec_augment.max_time_share = {self.max_time_share}: choose a share from 0 to 1")


def spec_augment(log_mel: Tensor, segments: Segments, settings: SpecAugmentSettings) -> Tensor:
    """A copy of `log_mel` with the masks of every segment set to 0, the mean of normalised features.

    The masks of a segment are a pure function of its seed, its length and the settings: the same in any row, on any
    device and whatever was drawn before.

    Args:
        log_mel: normalised features `[R, F, M]`.
        segments: in mel frames, with seeds. Segments of a row do not overlap.
    """
    device = log_mel.device
    assert segments.seed is not None
    start, length, seed = (tensor.to(device) for tensor in (segments.start, segments.length, segments.seed))
    masked = _time_masks(log_mel.shape[1], start, length, seed, settings)[:, :, None]
    masked = masked | _freq_masks(log_mel.shape[1], log_mel.shape[2], start, length, seed, settings)
    return log_mel.masked_fill(masked, 0.0)


def _time_masks(num_frames: int, start: Tensor, length: Tensor, seed: Tensor, settings: SpecAugmentSettings) -> Tensor:
    """bool `[R, F]`"""
    periods = -(-num_frames // settings.time_mask_period)
    count = settings.num_time_masks * (-(-length // settings.time_mask_period))
    slots = torch.arange(settings.num_time_masks * periods, device=start.device)
    limit = (length * settings.max_time_share).long().clamp(max=settings.max_time_width)
    width = _uniform(seed, 2 * slots, limit[..., None] + 1) * (slots < count[..., None])
    first = start[..., None] + _uniform(seed, 2 * slots + 1, length[..., None] - width + 1)
    return _running_sum(num_frames, first.flatten(1), (first + width).flatten(1), torch.ones_like(first).flatten(1)) > 0


def _freq_masks(
    num_frames: int, num_mels: int, start: Tensor, length: Tensor, seed: Tensor, settings: SpecAugmentSettings
) -> Tensor:
    """bool `[R, F, M]`"""
    draws = -1 - torch.arange(2 * settings.num_freq_masks, device=start.device)  # the negative ones: no time mask's
    width = _uniform(seed, draws[::2], torch.tensor(min(settings.max_freq_width, num_mels) + 1, device=start.device))
    first = _uniform(seed, draws[1::2], num_mels - width + 1)
    bins = torch.arange(num_mels, device=start.device)
    bands = ((bins >= first[..., None]) & (bins < (first + width)[..., None])).any(dim=2)  # [R, S, M]
    none = torch.zeros_like(bands[:, :1])
    slot = torch.arange(1, start.shape[1] + 1, device=start.device).expand_as(start)
    slot_of_frame = _running_sum(num_frames, start, start + length, slot)  # [R, F]; 0 outside segments
    index = slot_of_frame[:, :, None].expand(-1, -1, num_mels)
    return torch.cat([none, bands], dim=1).gather(1, index)


def _running_sum(num_frames: int, first: Tensor, end: Tensor, value: Tensor) -> Tensor:
    """Sum of the values of all intervals `[first, end)` over each frame: int64 `[R, F]` from int64 `[R, K]`s."""
    change = torch.zeros(first.shape[0], num_frames + 1, dtype=torch.int64, device=first.device)
    change.scatter_add_(1, first, value).scatter_add_(1, end, -value)
    return change.cumsum(dim=1)[:, :num_frames]


def _uniform(seed: Tensor, draw: Tensor, bound: Tensor) -> Tensor:
    """Integers uniform in `[0, bound)`, int64 `[R, S, K]`: a hash of the seed `[R, S]` and the draw's number `[K]`.

    A counter-based generator, because a stateful one would make a mask depend on what was drawn before it. The
    mixing function is that of SplitMix64 (Steele, Lea and Flood 2014); int64 products wrap as needed.
    """
    bits = splitmix64(splitmix64(seed[..., None] + 0x5BEC) + draw * INCREMENT)
    return ((bits >> 11) & ((1 << 53) - 1)) % bound
