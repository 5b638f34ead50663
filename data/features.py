"""Log-mel features of a waveform.

Frame i is centred on sample `i * hop` (the signal is reflected at both ends), so `frames = 1 + samples // hop` and
frame i stands for the time `i * hop_ms / 1000` seconds. Values are natural logarithms of mel energies of a waveform
in [-1, 1], unless the settings say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torchaudio
from torch import Tensor

from common.errors import UserError
from data.feature_settings import FeatureSettings as FeatureSettings
from data.feature_settings import difference as difference

# Frames per pass. Small enough to stay in the cache (several times the speed of one pass over a minute); fixed, so that
# a long recording gives bit for bit the same frames whatever is done around it.
BLOCK_FRAMES = 128


class LogMel:
    """`LogMel(settings)(waveform)`: float32 [samples] -> float32 [frames, M], natural logarithm of mel energies.

    Equals `log(clamp(torchaudio.transforms.MelSpectrogram(...)))` to rounding; computed in blocks that fit the cache.
    Raises UserError for audio shorter than a window or with NaN or infinite samples.
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

    def __call__(self, waveform: Tensor | np.ndarray) -> Tensor:
        waveform = torch.as_tensor(waveform, dtype=torch.float32)
        if waveform.ndim != 1:
            raise UserError(f"a waveform must have one dimension [samples], not the shape {list(waveform.shape)}")
        return torch.cat(list(self.blocks([waveform])))

    def blocks(self, sound: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same frames for sound that comes in blocks: float32 [samples] of any length -> float32 [frames, M].

        Bit for bit what one call on all of it gives, in memory that does not depend on its length (unless they are to
        be standardized, which takes all frames). Raises as a call.
        """
        blocks = self._blocks(sound)
        return iter([_standardized(torch.cat(list(blocks)))]) if self.settings.standardized else blocks

    @torch.no_grad()
    def _blocks(self, sound: Iterable[Tensor]) -> Iterator[Tensor]:
        s = self.settings
        half = s.n_fft // 2
        shortest, step = max(s.window, half + 1), BLOCK_FRAMES * s.hop
        enough = max(step, step - s.hop + s.n_fft)  # samples, before a block of frames can be computed
        held = tail = torch.empty(0)  # sound from the next frame's window on; the last of all sound
        samples = done = 0
        for block in sound:
            held, tail = torch.cat([held, block]), torch.cat([tail, block[-half - 1 :]])[-half - 1 :]
            began, samples = samples >= shortest, samples + len(block)
            if not began and samples >= shortest:
                held = torch.cat([held[1 : half + 1].flip(0), held])  # the signal is reflected at its start
            if samples >= shortest and len(held) >= enough:
                whole = ((len(held) - enough) // step + 1) * BLOCK_FRAMES
                yield self._log_mel(held.unfold(0, s.n_fft, s.hop)[:whole])
                held, done = held[whole * s.hop :], done + whole
        if samples < shortest:
            raise UserError(f"audio of {samples} samples is too short: at least {shortest} are needed")
        held = torch.cat([held, tail[:-1].flip(0)])
        if done <= samples // s.hop:
            yield self._log_mel(held.unfold(0, s.n_fft, s.hop)[: 1 + samples // s.hop - done])

    def _log_mel(self, frames: Tensor) -> Tensor:
        """float32 [frames, n_fft] -> [frames, M]."""
        log_mel = torch.empty(len(frames), self.settings.num_mels)
        for begin in range(0, len(frames), BLOCK_FRAMES):
            spectrum = torch.fft.rfft(frames[begin : begin + BLOCK_FRAMES] * self.window)
            power = spectrum.real.square() + spectrum.imag.square()  # ten times as fast as |x|**2 or a sum over pairs
            mel = power @ self.filters
            if self.settings.logarithm:
                mel = mel.clamp_(min=self.settings.log_floor).log_()
            log_mel[begin : begin + BLOCK_FRAMES] = mel
        # One sum tells: it is finite exactly when all values are (logarithms of float32 cannot overflow it).
        if not torch.isfinite(log_mel.sum()):
            raise UserError("audio with NaN or infinite samples: repair or remove the recording")
        return log_mel


def _standardized(frames: Tensor) -> Tensor:
    """float32 [frames, M] with every bin at zero mean and unit (unbiased) standard deviation. Raises UserError."""
    values = (frames - frames.mean(dim=0)) / frames.std(dim=0)
    if not torch.isfinite(values.sum()):
        raise UserError("audio with a mel bin that never changes, such as silence: it cannot be standardized")
    return values
