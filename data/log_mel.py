"""Log-mel features of a waveform, computed block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from data.features import FeatureSettings

# Frames per pass. Small enough to stay in the cache (several times the speed of one pass over a minute), and fixed, so
# that the frames of a recording are bit-identical however it is read.
BLOCK_FRAMES = 128


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
