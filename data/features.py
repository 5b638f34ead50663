"""Audio to log-mel: settings, the transform, and reading of audio files.

Frame i is centred on sample `i * hop` (the signal is reflected at both ends), so `frames = 1 + samples // hop` and
frame i stands for the time `i * hop_ms / 1000` seconds. Values are natural logarithms of mel energies of a waveform
in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from data.errors import DataError

# Frames per pass. Small enough to stay in the cache (several times the speed of one pass over a minute); fixed, so that
# a long recording gives bit for bit the same frames whatever is done around it.
BLOCK_FRAMES = 128
# Seconds of audio that are decoded, mixed down and resampled at a time: bounds memory for hours of 48 kHz stereo.
READ_SECONDS = 60


@dataclass(frozen=True)
class FeatureSettings:
    """Everything that decides the numbers of a log-mel spectrogram. Its hash travels with data and models."""

    sample_rate: int = 16000
    """Samples per second; audio at another rate is resampled to it."""
    num_mels: int = 80
    """Mel bins."""
    window_ms: float = 25.0
    """Length of the Hann window in milliseconds."""
    hop_ms: float = 10.0
    """Time from one frame to the next in milliseconds."""
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
    channels: Literal["mean"] = "mean"
    """How several channels become one: their mean."""

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, fix: str) -> None:
            if not ok:
                raise DataError(f"features.{field} is {getattr(self, field)!r}: {fix}")

        require(self.sample_rate > 0, "sample_rate", "must be positive")
        require(self.num_mels > 0, "num_mels", "must be positive")
        require(_is_integer(self.hop_ms * self.sample_rate / 1000), "hop_ms", "must be a whole number of samples")
        require(_is_integer(self.window_ms * self.sample_rate / 1000), "window_ms", "must be a whole number of samples")
        require(self.window <= self.n_fft, "n_fft", f"must be at least the window of {self.window} samples")
        require(0 <= self.low_hz < self.high_hz, "low_hz", f"must lie between 0 and high_hz = {self.high_hz}")
        require(self.high_hz <= self.sample_rate / 2, "high_hz", f"must be at most {self.sample_rate / 2}")
        require(self.mel_scale in ("htk", "slaney"), "mel_scale", "must be 'htk' or 'slaney'")
        require(self.log_floor > 0, "log_floor", "must be positive, or silence is minus infinity")
        require(self.channels == "mean", "channels", "must be 'mean'")

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
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, int | float | str]) -> FeatureSettings:
        """The inverse of `to_dict`. Raises DataError on an unknown or a missing field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != known:
            wrong = sorted(set(fields) ^ known) if isinstance(fields, dict) else fields
            raise DataError(f"feature settings with unknown or missing fields: {wrong}; expected {sorted(known)}")
        return cls(**fields)  # type: ignore[arg-type]

    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON; numbers are written as floats so that 25 and 25.0 are one setting."""
        fields = {k: float(v) if isinstance(v, (int, float)) else v for k, v in self.to_dict().items()}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def difference(a: FeatureSettings, b: FeatureSettings) -> list[str]:
    """The differing fields of two settings as `'field: x != y'`, for error messages; empty when they are equal."""
    pairs = ((f.name, getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(FeatureSettings))
    return [f"{name}: {x!r} != {y!r}" for name, x, y in pairs if x != y]


class LogMel:
    """`LogMel(settings)(waveform)`: float32 [samples] -> float32 [frames, M], natural logarithm of mel energies.

    Equals `log(clamp(torchaudio.transforms.MelSpectrogram(...)))` to rounding; computed in blocks that fit the cache.
    Raises DataError for audio shorter than a window or with NaN or infinite samples.
    """

    def __init__(self, settings: FeatureSettings) -> None:
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

    @torch.no_grad()
    def __call__(self, waveform: Tensor | np.ndarray) -> Tensor:
        s = self.settings
        waveform = torch.as_tensor(waveform, dtype=torch.float32)
        if waveform.ndim != 1:
            raise DataError(f"a waveform must have one dimension [samples], not the shape {list(waveform.shape)}")
        half = s.n_fft // 2
        shortest = max(s.window, half + 1)
        if len(waveform) < shortest:
            raise DataError(f"audio of {len(waveform)} samples is too short: at least {shortest} are needed")
        padded = torch.nn.functional.pad(waveform[None], (half, half), mode="reflect")[0]
        frames = padded.unfold(0, s.n_fft, s.hop)[: 1 + len(waveform) // s.hop]
        log_mel = torch.empty(len(frames), s.num_mels)
        for begin in range(0, len(frames), BLOCK_FRAMES):
            spectrum = torch.fft.rfft(frames[begin : begin + BLOCK_FRAMES] * self.window)
            power = spectrum.real.square() + spectrum.imag.square()  # ten times as fast as |x|**2 or a sum over pairs
            log_mel[begin : begin + BLOCK_FRAMES] = (power @ self.filters).clamp_(min=s.log_floor).log_()
        # One sum tells: it is finite exactly when all values are (logarithms of float32 cannot overflow it).
        if not torch.isfinite(log_mel.sum()):
            raise DataError("audio with NaN or infinite samples: repair or remove the recording")
        return log_mel


def read_audio(source: str | os.PathLike[str] | BinaryIO, settings: FeatureSettings, name: str | None = None) -> Tensor:
    """Read an audio file by soundfile: mean of the channels, resampled, float32 [samples] at settings.sample_rate.

    Args:
        source: a path, or an open binary file (`name` then names it in errors).
    Raises:
        DataError naming the file: missing, unreadable, cut short, empty, or with NaN or infinite samples.
    """
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "audio bytes")
    if isinstance(source, (str, os.PathLike)):
        if not Path(source).is_file():
            raise DataError(f"{name}: no such audio file")
        if Path(source).stat().st_size == 0:
            raise DataError(f"{name}: the audio file is empty (0 bytes)")
    try:
        with soundfile.SoundFile(source) as audio:
            rate, announced = audio.samplerate, audio.frames
            blocks = []
            while len(block := audio.read(READ_SECONDS * rate, dtype="float32", always_2d=True)):
                blocks.append(block[:, 0] if block.shape[1] == 1 else block.mean(axis=1))
    except (soundfile.SoundFileError, RuntimeError, io.UnsupportedOperation) as error:
        raise DataError(f"{name}: cannot be read as audio ({error}); repair or remove it") from error
    samples = sum(map(len, blocks))
    if samples == 0:
        raise DataError(f"{name}: holds no audio samples")
    # Compressed formats announce their length; some round it, none by a hundredth.
    if samples < 0.99 * announced:
        raise DataError(f"{name}: cut short, {samples} of {announced} samples could be read")
    waveform = resample(blocks, rate, settings.sample_rate)
    if not torch.isfinite(waveform.sum(dtype=torch.float64)):
        raise DataError(f"{name}: audio with NaN or infinite samples; repair or remove it")
    return waveform


def resample(blocks: list[np.ndarray], rate: int, new_rate: int) -> Tensor:
    """Join mono float32 blocks [samples] and resample them, a block at a time, to float32 [samples] at new_rate.

    The sinc kernel is finite, so a block with enough context on both sides gives what one pass over everything would
    give. All blocks but the last must hold a whole number of seconds.
    """
    waveform = torch.from_numpy(np.concatenate(blocks) if len(blocks) > 1 else blocks[0])
    if rate == new_rate:
        return waveform
    resampler = _resampler(rate, new_rate)
    total = -(-len(waveform) * new_rate // rate)
    pieces = []
    for second in range(0, -(-len(waveform) // rate), READ_SECONDS):
        # One second of context is far more than the kernel reaches, and a whole number of periods of both rates.
        first, last = max(0, second - 1), second + READ_SECONDS + 1
        piece = resampler(waveform[first * rate : last * rate])
        begin = (second - first) * new_rate
        pieces.append(piece[begin : begin + READ_SECONDS * new_rate])
    return torch.cat(pieces)[:total]


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, new_rate: int) -> torchaudio.transforms.Resample:
    """Resample by torchaudio with its kernel computed once (for 44.1 kHz that costs more than a second of audio)."""
    return torchaudio.transforms.Resample(rate, new_rate)


def _is_integer(x: float) -> bool:
    return x > 0 and abs(x - round(x)) < 1e-6
