"""Settings of log-mel features; `data.log_mel` computes them.

Frame i is centred on sample `i * hop` (the signal is reflected at both ends), which is at `i * hop_ms / 1000` seconds,
so `frames = 1 + samples // hop`. By default, values are natural logarithms of mel energies of a waveform in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Literal

from common.errors import UserError

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

        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            kinds = (int, float) if kind is float else kind
            fits = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
            require(fits and (kind is str or abs(value) < 10**15), field.name, f"must be a {kind.__name__}")
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


def _is_integer(x: float) -> bool:
    return x > 0 and abs(x - round(x)) < 1e-6
