"""Augmentation of labelled crops in the mel domain: another speed, and warped frequencies.

Both are drawn from the seed of the crop, which is a pure function of (seed, epoch, crop). They therefore depend neither
on packing nor on workers and processes, and a resumed run repeats them. Rows are packed by the lengths after the change
of speed, which are computed from the seeds alone.

Sources: Ko et al., "Audio augmentation for speech recognition", Interspeech 2015 (speed); Jaitly and Hinton, "Vocal
Tract Length Perturbation (VTLP) improves speech recognition", ICML workshop 2013 (frequencies).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jsonargparse.typing import ClosedUnitInterval

from common.errors import UserError
from common.hashing import mix
from data.features import FeatureSettings
from data.loading.loader import LoaderSettings
from data.loading.order import Crops, CropTable

Change = Literal["speed", "frequency_warp"]
_DOMAINS = {"speed": 8, "frequency_warp": 9}  # of the hash; order.py, rows.py and mixture.py have the others
BOUNDARY = 0.6
"""share of half the sample rate up to which frequencies are scaled: 4.8 kHz at 16 kHz (Jaitly and Hinton)"""


@dataclass(frozen=True)
class AugmentSettings:
    """Changes of training crops, drawn for every crop and epoch."""

    speed: ClosedUnitInterval = 0.0
    """largest relative change of the speed, such as 0.1: the rate is uniform in 1 - speed to 1 + speed. The mel frames
    are resampled along time, so that pitch and formants stay; no crop becomes longer than a row. 0 disables it"""
    frequency_warp: ClosedUnitInterval = 0.0
    """largest relative change of the frequencies, such as 0.1: the warping factor is uniform in 1 - frequency_warp to
    1 + frequency_warp (vocal tract length perturbation). 0 disables it"""

    def __post_init__(self) -> None:
        for name in ("speed", "frequency_warp"):
            if getattr(self, name) > 0.5:
                raise UserError(f"data.augment.{name} is {getattr(self, name)}: give 0 to 0.5, such as 0.1")


@dataclass(frozen=True)
class SupervisedSettings(LoaderSettings):
    """Recordings, order, packing, reading and augmentation of labelled batches."""

    augment: AugmentSettings = field(default_factory=AugmentSettings)
    """Changes of training crops."""


def augmented(crops: CropTable, settings: SupervisedSettings, features: FeatureSettings) -> CropTable:
    """Order of the same crops with the augmentation of the settings, or `crops` if it is disabled."""
    if not settings.augment.speed and not settings.augment.frequency_warp:
        return crops
    return AugmentedCrops(crops, settings.augment, features, settings.row_frames)


class AugmentedCrops(CropTable):
    """Crops of another order, changed when they are read.

    Args:
        crops: the order.
        features: of the dataset.
        row_frames: maximum length of a crop after the change of speed.
    """

    augments = True

    def __init__(self, crops: CropTable, settings: AugmentSettings, features: FeatureSettings, row_frames: int) -> None:
        self.source, self.speed, self.warp, self.row_frames = crops, settings.speed, settings.frequency_warp, row_frames
        self.seed, self.max_frames, self.min_frames = crops.seed, crops.max_frames, crops.min_frames
        self.labelled, self.texts = crops.labelled, crops.texts
        self.features = features

    def __len__(self) -> int:
        return len(self.source)

    @property
    def items(self) -> int:
        return self.source.items

    @property
    def mean_frames(self) -> float:
        return self.source.mean_frames

    def settings(self) -> dict[str, int]:
        changes = {"augment.speed": self.speed, "augment.frequency_warp": self.warp}
        return {**self.source.settings(), **{f"{name} x 10^6": round(x * 1e6) for name, x in changes.items()}}

    def text(self, item: int) -> str:
        return self.source.text(item)

    def crops(self, epoch: int, k: np.ndarray) -> Crops:
        return self.source.crops(epoch, k)

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.source._cut(epoch, item)

    def lengths(self, crops: Crops) -> np.ndarray:
        frames = np.rint((crops.stop - crops.start) / _factors("speed", crops.seed, self.speed))
        return frames.astype(np.int64).clip(1, self.row_frames)

    def augment(self, frames: np.ndarray, seed: int, out: np.ndarray) -> None:
        """Resample float32 frames `[n, M]` of the crop with this seed to `out` `[m, M]` and warp their frequencies."""
        position = (np.arange(len(out)) + 0.5) * (len(frames) / len(out)) - 0.5
        values = _interpolate(frames, position, axis=0) if self.speed else frames
        if self.warp:
            values = _interpolate(values, warped_bins(self.features, self.factor("frequency_warp", seed)), axis=1)
        out[:] = values

    def factor(self, change: Change, seed: int) -> float:
        """Factor of a change for the crop with this seed."""
        return float(_factors(change, np.array([seed]), self.speed if change == "speed" else self.warp)[0])


def _factors(change: Change, seed: np.ndarray, largest_change: float) -> np.ndarray:
    """Factors uniform in [1 - largest_change, 1 + largest_change), float64, from seeds of the same shape."""
    uniform = (mix(_DOMAINS[change], seed) >> np.uint64(11)).astype(np.float64) / 2**53
    return 1 + largest_change * (2 * uniform - 1)


def _interpolate(values: np.ndarray, position: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation along an axis at fractional indices, which are clipped to the range of indices."""
    last = values.shape[axis] - 1
    position = position.clip(0, last)
    first = position.astype(np.int64)
    weight = (position - first).astype(values.dtype)
    before, after = values.take(first, axis), values.take(np.minimum(first + 1, last), axis)
    return before + (after - before) * (weight[:, None] if axis == 0 else weight)


def warped_bins(features: FeatureSettings, factor: float) -> np.ndarray:
    """Fractional indices of the mel bins from which the bins are read, float64 `[M]`.

    A bin at frequency f is read at `factor * f` up to the boundary, and then on a line to half the sample rate, which
    is fixed (Jaitly and Hinton 2013).
    """
    low, high = hz_to_mel(np.array([features.low_hz, features.high_hz]), features.mel_scale).tolist()
    edges = np.linspace(low, high, features.num_mels + 2)
    hz = mel_to_hz(edges[1:-1], features.mel_scale)
    half, top = features.sample_rate / 2, BOUNDARY * features.sample_rate / 2 * min(factor, 1.0)
    slope = (half - top) / (half - top / factor)
    warped = np.where(hz <= top / factor, hz * factor, half - slope * (half - hz))
    return (hz_to_mel(warped, features.mel_scale) - edges[0]) / (edges[1] - edges[0]) - 1


def hz_to_mel(hz: np.ndarray, scale: str) -> np.ndarray:
    """Mel of frequencies in Hz, on the scale 'htk' or 'slaney' of torchaudio."""
    if scale == "htk":
        return 2595 * np.log10(1 + hz / 700)
    return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1000) / 1000) * 27 / np.log(6.4))


def mel_to_hz(mel: np.ndarray, scale: str) -> np.ndarray:
    """Inverse of `hz_to_mel`."""
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
