"""Audio to log-mel: the transform, and reading of audio files.

Frame i is centred on sample `i * hop` (the signal is reflected at both ends), so `frames = 1 + samples // hop` and
frame i stands for the time `i * hop_ms / 1000` seconds. Values are natural logarithms of mel energies of a waveform
in [-1, 1], unless the settings say otherwise.
"""

from __future__ import annotations

import functools
import math
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from data.errors import DataError
from data.feature_settings import FeatureSettings as FeatureSettings
from data.feature_settings import difference as difference

# Frames per pass. Small enough to stay in the cache (several times the speed of one pass over a minute); fixed, so that
# a long recording gives bit for bit the same frames whatever is done around it.
BLOCK_FRAMES = 128
# Seconds of audio that are resampled at a time, and float32 values (of all channels) that are decoded at a time: they
# bound the memory for hours of 48 kHz stereo, and for a header that lies. The first is fixed, as BLOCK_FRAMES is.
READ_SECONDS = 10
_READ_VALUES = 1 << 20
# Of a resampling kernel: those of all rates that are multiples of 25 Hz, up to 192 kHz, are below.
_KERNEL_VALUES = 1 << 23
_LOWEST_RATE = 1000


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

    def __call__(self, waveform: Tensor | np.ndarray) -> Tensor:
        waveform = torch.as_tensor(waveform, dtype=torch.float32)
        if waveform.ndim != 1:
            raise DataError(f"a waveform must have one dimension [samples], not the shape {list(waveform.shape)}")
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
            raise DataError(f"audio of {samples} samples is too short: at least {shortest} are needed")
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
            raise DataError("audio with NaN or infinite samples: repair or remove the recording")
        return log_mel


def _standardized(frames: Tensor) -> Tensor:
    """float32 [frames, M] with every bin at zero mean and unit (unbiased) standard deviation. Raises DataError."""
    values = (frames - frames.mean(dim=0)) / frames.std(dim=0)
    if not torch.isfinite(values.sum()):
        raise DataError("audio with a mel bin that never changes, such as silence: it cannot be standardized")
    return values


def read_audio(source: str | os.PathLike[str] | BinaryIO, settings: FeatureSettings, name: str | None = None) -> Tensor:
    """All of `audio_blocks` in one tensor: float32 [samples] at settings.sample_rate."""
    return torch.cat(list(audio_blocks(source, settings, name)))


def audio_blocks(
    source: str | os.PathLike[str] | BinaryIO,
    settings: FeatureSettings,
    name: str | None = None,
    start: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
) -> Iterator[Tensor]:
    """Read audio by soundfile, some seconds at a time: one channel, resampled, as blocks of float32 [samples].

    Memory does not depend on the audio's length, and the samples do not depend on the blocks.

    Args:
        source: a path, or an open binary file (`name` then names it in errors).
        start, duration: the stretch to read, in seconds; all of it when there is no duration.
        channel: the channel to read, from 0; without one, as settings.channels says.
    Raises:
        DataError naming the file: missing, unreadable, cut short, empty, ending within the stretch, with NaN or
        infinite samples, or with a sample rate that cannot be resampled. Some of these are seen only at the end.
    """
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "audio bytes")
    if isinstance(source, (str, os.PathLike)):
        try:
            state = os.stat(source)
        except OSError as error:
            raise DataError(f"{name}: no such audio file ({error.strerror})") from error
        if not stat.S_ISREG(state.st_mode):  # a named pipe would be waited for
            raise DataError(f"{name}: is no regular file")
        if state.st_size == 0:
            raise DataError(f"{name}: the audio file is empty (0 bytes)")
    # soundfile encodes text strictly, and a name need not be UTF-8.
    opened = os.fsencode(source) if isinstance(source, (str, os.PathLike)) else source
    try:
        with soundfile.SoundFile(opened) as audio:
            if channel is None and settings.channels == "first":
                channel = 0
            decoded = _decode(audio, name, start, duration, channel)
            yield from resample_blocks(decoded, audio.samplerate, settings.sample_rate, name)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise DataError(f"{name}: cannot be read as audio ({error}); repair or remove it") from error


def _decode(
    audio: soundfile.SoundFile, name: str, start: float, duration: float | None, channel: int | None
) -> Iterator[Tensor]:
    """One channel, or the mean of all, as the file has it: blocks of float32 [samples]."""
    if channel is not None and channel >= audio.channels:
        raise DataError(f"{name}: has {audio.channels} channels, and none of number {channel} (from 0)")
    size = max(1, _READ_VALUES // audio.channels)
    wanted = audio.frames
    if stretch := duration is not None:
        first, wanted = round(start * audio.samplerate), round(duration * audio.samplerate)
        if first >= audio.frames:
            raise DataError(f"{name}: ends before the segment's start at {start} s")
        audio.seek(first)
    samples = 0
    # What the header announces is not trusted to be there, nor to be all: some formats do not know it.
    while len(block := audio.read(min(size, wanted - samples) if stretch else size, "float32", always_2d=True)):
        samples += len(block)
        # Column by column: thirty times as fast as numpy's mean over a short axis.
        columns = block.T if channel is None else block.T[channel : channel + 1]
        mono = torch.from_numpy(np.ascontiguousarray(sum(columns[1:], start=columns[0])))
        if len(columns) > 1:
            mono /= len(columns)
        if not torch.isfinite(mono.sum(dtype=torch.float64)):
            raise DataError(f"{name}: audio with NaN or infinite samples; repair or remove it")
        yield mono
    if stretch and samples < wanted:
        raise DataError(f"{name}: ends before the segment's end, {start} + {duration} s")
    if samples == 0:
        raise DataError(f"{name}: holds no audio samples")
    # Compressed formats announce their length; some round it, none by a hundredth.
    if samples < 0.99 * wanted:
        raise DataError(f"{name}: cut short, {samples} of {wanted} samples could be read")


def resample(blocks: Iterable[Tensor | np.ndarray], rate: int, new_rate: int) -> Tensor:
    """All of `resample_blocks` in one tensor: float32 [samples] at new_rate."""
    return torch.cat(list(resample_blocks(map(torch.as_tensor, blocks), rate, new_rate)))


def resample_blocks(blocks: Iterable[Tensor], rate: int, new_rate: int, name: str = "audio") -> Iterator[Tensor]:
    """Resample mono float32 [samples] in blocks of any length, by torchaudio, to blocks at new_rate.

    Computed READ_SECONDS at a time, on a grid of its own, so that the numbers do not depend on the blocks. The sinc
    kernel is finite, so a stretch with enough context on both sides gives what one pass over everything would give.
    Raises DataError for a rate that has so little in common with new_rate that the kernel would fill the memory.
    """
    if rate == new_rate:
        yield from blocks
        return
    period, periods = rate // math.gcd(rate, new_rate), new_rate // math.gcd(rate, new_rate)
    if period * periods > _KERNEL_VALUES or rate < _LOWEST_RATE:
        raise DataError(f"{name}: {rate} Hz cannot be resampled to {new_rate} Hz; convert the file to a usual rate")
    resampler = _resampler(rate, new_rate)
    reach = (resampler.width // period + 1) * period  # whole periods, as the kernel's phase begins anew with each
    size = READ_SECONDS * rate
    held, before = torch.empty(0), 0  # samples not yet resampled, behind `before` samples of context
    for block in chain(blocks, [None]):
        held = held if block is None else torch.cat([held, block])
        while len(held) >= before + size + reach or (block is None and len(held) > before):
            piece = resampler(held[: before + size + reach])
            context = before // period * periods
            yield piece[context : context + READ_SECONDS * new_rate]
            held = held[before + size - reach :] if len(held) > before + size else held[:0]
            before = reach if len(held) else 0


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, new_rate: int) -> torchaudio.transforms.Resample:
    """Resample by torchaudio with its kernel computed once (for 44.1 kHz that costs more than a second of audio)."""
    return torchaudio.transforms.Resample(rate, new_rate)
