"""Decoding of audio files to mono at the sample rate of the features, a few seconds at a time."""

from __future__ import annotations

import functools
import math
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from common.errors import AudioWarning, UserError
from data.audio.headers import Extent
from data.audio.opening import UNKNOWN_FRAMES, extent_of, open_audio, open_audio_path
from data.features import FeatureSettings
from data.transcripts import TOLERANCE

# Seconds of audio that are resampled at a time, and float32 values (of all channels) that are decoded at a time. They
# bound the memory for hours of 48 kHz stereo and for a wrong header. The first affects the samples, so it is fixed.
READ_SECONDS = 10
_READ_VALUES = 1 << 20
# Maximum size of a resampling kernel; all rates up to 192 kHz that are multiples of 25 Hz need less.
_KERNEL_VALUES = 1 << 23
_LOWEST_RATE = 1000
# Accepted difference from the length in the header: this share and at most TOLERANCE seconds, but at least this many
# bytes (some writers count the header too) and samples (MP3 is counted in frames of 1,152).
_MISSING_SHARE, _MISSING_BYTES, _MISSING_FRAMES = 0.01, 128, 2 * 1152
# Channels cancel if their mean has less than this fraction of the power that it would have for uncorrelated channels.
_CANCELLED = 0.1


def audio_blocks(
    source: str | os.PathLike[str] | BinaryIO,
    settings: FeatureSettings,
    name: str | None = None,
    start: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
) -> Iterator[Tensor]:
    """Decode a file with soundfile and resample it; yield mono blocks of float32 [samples].

    Memory does not depend on the length of the audio, and the samples do not depend on the blocks. Issues an
    AudioWarning for channels that cancel in their mean, for an Ogg file without an end-of-stream page, and for audio
    that cannot be read.

    Args:
        source: path, or an open, seekable binary file (`name` then names it in errors).
        start, duration: segment to read, in seconds; without a duration the whole file. A segment that ends up to
            TOLERANCE seconds after the audio is shortened.
        channel: channel to read, from 0; by default according to settings.channels.
    Raises:
        UserError: naming the file: missing, unreadable, truncated, empty, several concatenated streams, shorter than
            the segment, NaN or infinite samples, or an unsupported sample rate. Some of these are only detected at the
            end.
    """
    name = name or (str(source) if isinstance(source, (str, os.PathLike)) else "audio bytes")
    if isinstance(source, (str, os.PathLike)):
        try:
            state = os.stat(source)
        except OSError as error:
            raise UserError(f"{name}: no such audio file ({error.strerror})") from error
        if not stat.S_ISREG(state.st_mode):  # opening a named pipe would block
            raise UserError(f"{name}: not a regular file")
        if state.st_size == 0:
            raise UserError(f"{name}: the audio file is empty (0 bytes)")
    try:
        extent = extent_of(source)
        if extent.several:
            raise UserError(
                f"{name}: holds several streams (chained Ogg, or files joined with `cat`), but only the first would be "
                "read: decode each separately, and join or split the audio"
            )
        with open_audio(source, extent) as audio:
            if duration is None:
                _check_complete(audio, extent, name)
            if channel is None and settings.channels == "first":
                channel = 0
            decoded = _decode(audio, name, start, duration, channel)
            yield from resample_blocks(decoded, audio.samplerate, settings.sample_rate, name)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise UserError(f"{name}: cannot be read as audio ({error}); repair or remove it") from error


def audio_seconds(path: Path) -> float:
    """Length of an audio file from its header; estimated from its size if the header has none, 0 if unreadable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would block
            return 0.0
        with open(path, "rb") as file, open_audio_path(path, file) as audio:
            if audio.frames < UNKNOWN_FRAMES:
                return audio.frames / audio.samplerate
            # FLAC without a sample count: about one byte per sample.
            return path.stat().st_size / (audio.samplerate * audio.channels)
    except (soundfile.SoundFileError, RuntimeError, OSError):
        return 0.0


def _check_complete(audio: soundfile.SoundFile, extent: Extent, name: str) -> None:
    """Raise UserError if the file is noticeably shorter than its header declares; warn if it may be."""
    missing, trailing = (round(audio.frames * size / max(1, extent.held)) for size in (extent.missing, extent.trailing))
    if extent.missing > _MISSING_BYTES and missing > _accepted_missing(audio, audio.frames + missing):
        raise UserError(
            f"{name}: truncated, has {audio.frames} of about {audio.frames + missing} samples; download it again"
        )
    if extent.unterminated:
        message = f"{name}: the last Ogg page does not end the stream: download it again if it is truncated"
        warnings.warn(message, AudioWarning, stacklevel=2)
    if extent.trailing and not audio.frames:
        raise UserError(
            f"{name}: its header declares no audio, but {extent.trailing} bytes follow: correct it or download it again"
        )
    if trailing > TOLERANCE * audio.samplerate:
        message = (
            f"{name}: its header declares {audio.frames / audio.samplerate:.2f} s of audio; {extent.trailing} bytes "
            "after them are not read: if they are audio, correct the header (sox --ignore-length)"
        )
        warnings.warn(message, AudioWarning, stacklevel=2)


def _accepted_missing(audio: soundfile.SoundFile, declared: int) -> float:
    """Number of the declared samples that may be missing without an error."""
    return min(_MISSING_SHARE * declared, TOLERANCE * audio.samplerate)


def _decode(
    audio: soundfile.SoundFile, name: str, start: float, duration: float | None, channel: int | None
) -> Iterator[Tensor]:
    """Yield one channel, or the mean of all, at the rate of the file: blocks of float32 [samples]."""
    if channel is not None and channel >= audio.channels:
        raise UserError(f"{name}: has {audio.channels} channels and no channel {channel} (from 0)")
    size = max(1, _READ_VALUES // audio.channels)
    requested = available = audio.frames
    is_segment = duration is not None
    if duration is not None:
        requested = round(duration * audio.samplerate)
        available = min(requested, audio.frames - _seek(audio, start, name))
    samples, power = 0, _Power()
    # The file may hold less than its header declares, but never more.
    while samples < available and len(block := audio.read(min(size, available - samples), "float32", always_2d=True)):
        samples += len(block)
        # Sum of columns: 30 times faster than numpy's mean over a short axis.
        columns = block.T if channel is None else block.T[channel : channel + 1]
        mono = torch.from_numpy(np.ascontiguousarray(sum(columns[1:], start=columns[0])))
        if len(columns) > 1:
            mono /= len(columns)
            power.add(columns, mono)
        if not torch.isfinite(mono.sum(dtype=torch.float64)):
            raise UserError(f"{name}: audio with NaN or infinite samples; repair or remove it")
        yield mono
    if samples == 0 and is_segment and requested:
        raise UserError(f"{name}: ends before the segment's start at {start} s")
    if samples == 0:
        raise UserError(f"{name}: holds no audio samples" + (f" in the segment of {duration} s" if is_segment else ""))
    if is_segment and samples < requested - TOLERANCE * audio.samplerate:
        raise UserError(f"{name}: ends before the segment's end, {start} + {duration} s")
    if not is_segment and requested < UNKNOWN_FRAMES:
        # Compressed formats declare their length; some round it, by less than 1 %.
        if samples < (1 - _MISSING_SHARE) * requested:
            raise UserError(f"{name}: truncated, {samples} of {requested} samples could be read")
        if requested - samples > max(_MISSING_FRAMES, _accepted_missing(audio, requested)):
            message = f"{name}: {samples} of {requested} samples could be read: download it again if it is truncated"
            warnings.warn(message, AudioWarning, stacklevel=2)
    power.check(name)


def _seek(audio: soundfile.SoundFile, start: float, name: str) -> int:
    """Seek to the start of a segment and return it in samples. Raises UserError if the audio ends before it."""
    first = round(start * audio.samplerate)
    try:
        if first < audio.frames:
            return audio.seek(first)
    except soundfile.SoundFileError:
        if audio.frames < UNKNOWN_FRAMES:
            raise
    raise UserError(f"{name}: ends before the segment's start at {start} s")


class _Power:
    """Accumulator of the power of all channels and of their mean, without DC offset."""

    def __init__(self) -> None:
        self.sums = np.zeros((2, 0))  # rows: samples, squares; columns: channels, mean
        self.samples = self.channels = 0

    def add(self, columns: np.ndarray, mono: Tensor) -> None:
        """Add a block: float32 [channels, samples] and their mean [samples]."""
        signals = [torch.from_numpy(np.ascontiguousarray(column)) for column in columns] + [mono]
        sums = np.array([[signal.sum(dtype=torch.float64).item() for signal in signals],
                         [signal.square().sum(dtype=torch.float64).item() for signal in signals]])  # fmt: skip
        self.sums = sums if not self.samples else self.sums + sums
        self.samples, self.channels = self.samples + len(mono), len(columns)

    def check(self, name: str) -> None:
        """Issue an AudioWarning if the channels cancel in their mean."""
        if not self.samples:
            return
        *channels, mean = self.sums[1] / self.samples - (self.sums[0] / self.samples) ** 2
        remaining = mean * len(channels) / sum(channels) if sum(channels) > 0 else 1.0
        if remaining < _CANCELLED / len(channels):
            message = (
                f"{name}: the channels cancel (is one inverted?), {100 * max(0.0, remaining):.1f} % of their power is "
                "left in the mean: prepare with --features.channels first, or convert the file to one channel"
            )
            warnings.warn(message, AudioWarning, stacklevel=2)


def resample(blocks: Iterable[Tensor | np.ndarray], rate: int, new_rate: int) -> Tensor:
    """Concatenated `resample_blocks`: float32 [samples] at new_rate."""
    return torch.cat(list(resample_blocks(map(torch.as_tensor, blocks), rate, new_rate)))


def resample_blocks(blocks: Iterable[Tensor], rate: int, new_rate: int, name: str = "audio") -> Iterator[Tensor]:
    """Resample mono blocks of float32 [samples] of any length with torchaudio to blocks at new_rate.

    Computed on a fixed grid of READ_SECONDS, so that the samples do not depend on the blocks. The sinc kernel is
    finite, so each grid segment with enough context on both sides gives the same samples as a single pass. Raises
    UserError for a pair of rates whose kernel would be too large for memory.
    """
    if rate == new_rate:
        yield from blocks
        return
    period, periods = rate // math.gcd(rate, new_rate), new_rate // math.gcd(rate, new_rate)
    if period * periods > _KERNEL_VALUES or rate < _LOWEST_RATE:
        raise UserError(f"{name}: {rate} Hz cannot be resampled to {new_rate} Hz; convert the file to a usual rate")
    resampler = _resampler(rate, new_rate)
    context = (resampler.width // period + 1) * period  # whole periods keep the phase of the kernel
    size = READ_SECONDS * rate
    buffer, before = torch.empty(0), 0  # samples not yet resampled, after `before` samples of context
    for block in chain(blocks, [None]):
        buffer = buffer if block is None else torch.cat([buffer, block])
        while len(buffer) >= before + size + context or (block is None and len(buffer) > before):
            resampled = resampler(buffer[: before + size + context])
            skipped = before // period * periods
            yield resampled[skipped : skipped + READ_SECONDS * new_rate]
            buffer = buffer[before + size - context :] if len(buffer) > before + size else buffer[:0]
            before = context if len(buffer) else 0


@functools.lru_cache(maxsize=16)
def _resampler(rate: int, new_rate: int) -> torchaudio.transforms.Resample:
    """Resampler of torchaudio with a cached kernel, which takes longer to compute than a second of 44.1 kHz audio."""
    return torchaudio.transforms.Resample(rate, new_rate)
