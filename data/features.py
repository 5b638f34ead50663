"""Log-mel features of a waveform, and their settings.

Frame i is centred on sample `i * hop` (the signal is reflected at both ends), which is at `i * hop_ms / 1000` seconds,
so `frames = 1 + samples // hop`. By default, values are natural logarithms of mel energies of a waveform in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

# Frames per pass. Small enough to stay in the cache (several times the speed of one pass over a minute), and fixed, so
# that the frames of a recording are bit-identical however it is read.
BLOCK_FRAMES = 128

# Fields added after the first version, with their defaults, which are not written: older datasets and models keep their
# hash.
_LATER = {"logarithm": True, "standardized": False}


@dataclass(frozen=True)
class FeatureSettings:
    """All parameters of a log-mel spectrogram. Their hash is stored with datasets and models."""

    sample_rate: int = 16000
    """Samples per second; audio at another rate is resampled to it."""
    num_mels: int = 80
    """Mel bins."""
    window_ms: float = 25.0
    """Length of the Hann window in milliseconds."""
    hop_ms: float = 10.0
    """Time between the starts of adjacent frames in milliseconds."""
    n_fft: int = 512
    """Length of the Fourier transform in samples, at least the window."""
    low_hz: float = 20.0
    """Lower edge of the first mel bin."""
    high_hz: float = 8000.0
    """Upper edge of the last mel bin, at most half the sample rate."""
    mel_scale: Literal["htk", "slaney"] = "htk"
    """Formula of the mel scale, as torchaudio names it."""
    log_floor: float = 1e-6
    """Mel energies below this are raised to it before the logarithm (about 10 dB above 16-bit rounding noise), so that
    digital silence is finite and float16 keeps a resolution of 0.004."""
    channels: Literal["mean", "first"] = "mean"
    """Conversion of several channels to one: their mean, or the first (left) channel."""
    logarithm: bool = True
    """Take the natural logarithm of the mel energies; if false, energies are stored and log_floor has no effect."""
    standardized: bool = False
    """Scale every bin to zero mean and unit standard deviation over its recording before it is stored. With
    logarithm false, channels first and low_hz 0, these are the features of long-context-asr."""

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, fix: str) -> None:
            if not ok:
                raise UserError(f"features.{field} is {getattr(self, field)!r}: {fix}")

        require(self.sample_rate > 0, "sample_rate", "must be positive")
        require(self.num_mels > 0, "num_mels", "must be positive")
        require(_is_integer(self.hop_ms * self.sample_rate / 1000), "hop_ms", "must be a whole number of samples")
        require(_is_integer(self.window_ms * self.sample_rate / 1000), "window_ms", "must be a whole number of samples")
        require(self.window <= self.n_fft, "n_fft", f"must be at least the window of {self.window} samples")
        require(0 <= self.low_hz < self.high_hz, "low_hz", f"must lie between 0 and high_hz = {self.high_hz}")
        require(self.high_hz <= self.sample_rate / 2, "high_hz", f"must be at most {self.sample_rate / 2}")
        require(self.mel_scale in ("htk", "slaney"), "mel_scale", "must be 'htk' or 'slaney'")
        require(self.log_floor > 0, "log_floor", "must be positive, or silence is minus infinity")
        require(self.channels in ("mean", "first"), "channels", "must be 'mean' or 'first'")
        require(self.logarithm or self.standardized, "logarithm", "energies fit float16 only with standardized true")

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return round(self.hop_ms * self.sample_rate / 1000)

    @property
    def window(self) -> int:
        """Samples in a window."""
        return round(self.window_ms * self.sample_rate / 1000)

    @property
    def frames_per_second(self) -> float:
        return self.sample_rate / self.hop

    def to_dict(self) -> dict[str, int | float | str]:
        """Fields by name, as datasets and exports store them."""
        return {name: value for name, value in dataclasses.asdict(self).items() if _LATER.get(name) != value}

    @classmethod
    def from_dict(cls, fields: dict[str, int | float | str]) -> FeatureSettings:
        """Inverse of `to_dict`. Raises UserError for an unknown, missing or invalid field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) | set(_LATER) != known:
            wrong = sorted((set(fields) | set(_LATER)) ^ known) if isinstance(fields, dict) else fields
            raise UserError(f"feature settings with unknown or missing fields: {wrong}; expected {sorted(known)}")
        return cls(**fields)  # type: ignore[arg-type]

    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON, with numbers as floats, so that 25 and 25.0 are the same setting."""
        fields = {k: float(v) if isinstance(v, (int, float)) else v for k, v in self.to_dict().items()}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(a: FeatureSettings, b: FeatureSettings) -> list[str]:
    """Differing fields of two settings as `'field: x != y'`, for error messages; empty if the settings are equal."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(FeatureSettings))
    return [f"{name}: {x!r} != {y!r}" for name, x, y in pairs if x != y]


class LogMel:
    """Log-mel extractor: `LogMel(settings)(waveform)`, float32 [samples] -> float32 [frames, M].

    Equals `log(clamp(torchaudio.transforms.MelSpectrogram(...)))` up to rounding; computed in blocks that fit a cache.
    Raises UserError for audio shorter than a window or with NaN or infinite samples.
    """

    def __init__(self, settings: FeatureSettings) -> None:
        import torchaudio  # not at the top: readers of datasets need only the settings of this module

        self.settings = settings
        left = (settings.n_fft - settings.window) // 2
        right = settings.n_fft - settings.window - left
        self.window = torch.nn.functional.pad(torch.hann_window(settings.window), (left, right))
        self.filters = torchaudio.functional.melscale_fbanks(
            settings.n_fft // 2 + 1,
            settings.low_hz,
            settings.high_hz,
            settings.num_mels,
            settings.sample_rate,
            mel_scale=settings.mel_scale,
        )

    def __call__(self, waveform: Tensor | np.ndarray) -> Tensor:
        waveform = torch.as_tensor(waveform, dtype=torch.float32)
        if waveform.ndim != 1:
            raise UserError(f"a waveform must have one dimension [samples], not the shape {list(waveform.shape)}")
        return torch.cat(list(self.blocks([waveform])))

    def blocks(self, audio: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames of audio in blocks: float32 [samples] of any length -> float32 [frames, M].

        Bit-identical to one call on the whole waveform. Memory does not depend on the length of the audio, unless the
        features are standardized, which needs all frames. Raises the errors of a call.
        """
        blocks = self._blocks(audio)
        return iter([_standardized(torch.cat(list(blocks)))]) if self.settings.standardized else blocks

    @torch.no_grad()
    def _blocks(self, audio: Iterable[Tensor]) -> Iterator[Tensor]:
        s = self.settings
        half = s.n_fft // 2
        shortest, step = max(s.window, half + 1), BLOCK_FRAMES * s.hop
        needed = max(step, step - s.hop + s.n_fft)  # samples of a block of frames
        buffer = tail = torch.empty(0)  # samples from the next frame's window on; the last samples read
        samples = frames = 0
        for block in audio:
            buffer, tail = torch.cat([buffer, block]), torch.cat([tail, block[-half - 1 :]])[-half - 1 :]
            started, samples = samples >= shortest, samples + len(block)
            if not started and samples >= shortest:
                buffer = torch.cat([buffer[1 : half + 1].flip(0), buffer])  # the signal is reflected at its start
            if samples >= shortest and len(buffer) >= needed:
                ready = ((len(buffer) - needed) // step + 1) * BLOCK_FRAMES
                yield self._log_mel(buffer.unfold(0, s.n_fft, s.hop)[:ready])
                buffer, frames = buffer[ready * s.hop :], frames + ready
        if samples < shortest:
            raise UserError(f"audio of {samples} samples is too short: at least {shortest} are needed")
        buffer = torch.cat([buffer, tail[:-1].flip(0)])
        if frames <= samples // s.hop:
            yield self._log_mel(buffer.unfold(0, s.n_fft, s.hop)[: 1 + samples // s.hop - frames])

    def _log_mel(self, frames: Tensor) -> Tensor:
        """float32 [frames, n_fft] -> [frames, M]."""
        log_mel = torch.empty(len(frames), self.settings.num_mels)
        for start in range(0, len(frames), BLOCK_FRAMES):
            spectrum = torch.fft.rfft(frames[start : start + BLOCK_FRAMES] * self.window)
            power = spectrum.real.square() + spectrum.imag.square()  # ten times faster than |x|**2
            mel = power @ self.filters
            if self.settings.logarithm:
                mel = mel.clamp_(min=self.settings.log_floor).log_()
            log_mel[start : start + BLOCK_FRAMES] = mel
        # The sum is finite exactly if all values are: logarithms of float32 cannot overflow it.
        if not torch.isfinite(log_mel.sum()):
            raise UserError("audio with NaN or infinite samples: repair or remove the recording")
        return log_mel


def _standardized(frames: Tensor) -> Tensor:
    """Scale every bin of float32 [frames, M] to zero mean and unit (unbiased) standard deviation."""
    values = (frames - frames.mean(dim=0)) / frames.std(dim=0)
    if not torch.isfinite(values.sum()):
        raise UserError("audio with a constant mel bin, such as silence: it cannot be standardized")
    return values


def _is_integer(x: float) -> bool:
    return x > 0 and abs(x - round(x)) < 1e-6
