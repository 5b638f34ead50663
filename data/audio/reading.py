"""Audio files, decoded to mono at the features' sample rate, a few seconds at a time."""

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

from common.errors import SoundWarning, UserError
from data.audio.headers import Extent
from data.audio.opening import MOST_FRAMES, extent_of, opened, opened_path
from data.feature_settings import FeatureSettings
from data.transcripts import TOLERANCE

# Seconds of audio that are resampled at a time, and float32 values (of all channels) that are decoded at a time: they
# bound the memory for hours of 48 kHz stereo, and for a wrong header. The first is fixed, as BLOCK_FRAMES of the
# features is.
READ_SECONDS = 10
_READ_VALUES = 1 << 20
# Of a resampling kernel: those of all rates that are multiples of 25 Hz, up to 192 kHz, are below.
_KERNEL_VALUES = 1 << 23
_LOWEST_RATE = 1000
# Up to this share, and no more than TOLERANCE seconds, may be missing of the length in the header, and always this many
# bytes (some writers count the header itself) and samples (MP3 is counted in frames of 1,152).
_MISSING_SHARE, _MISSING_BYTES, _MISSING_FRAMES = 0.01, 128, 2 * 1152
# Channels cancel if their mean has less than this fraction of the power that it has for uncorrelated channels.
_CANCELLED = 0.1


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

    Memory does not depend on the audio's length, and the samples do not depend on the blocks. Issues a SoundWarning for
    channels that cancel each other out in their mean, for an Ogg file without an end-of-stream page, and where some
    sound cannot be read.

    Args:
        source: a path, or an open, seekable binary file (`name` then names it in errors).
        start, duration: the segment to read, in seconds; without a duration the whole file. A segment that ends up to
            TOLERANCE seconds after the sound is shortened.
        channel: the channel to read, from 0; by default as settings.channels says.
    Raises:
        UserError naming the file: missing, unreadable, truncated, empty, several concatenated streams, shorter than the
        segment, NaN or infinite samples, or a sample rate that cannot be resampled. Some of these are only found at the
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
        there = extent_of(source)
        if there.several:
            raise UserError(
                f"{name}: holds several streams (chained Ogg, or files joined with `cat`), of which only the first "
                "would be read; decode each separately, and join or split the sound"
            )
        with opened(source, there) as audio:
            if duration is None:
                _check_whole(audio, there, name)
            if channel is None and settings.channels == "first":
                channel = 0
            decoded = _decode(audio, name, start, duration, channel)
            yield from resample_blocks(decoded, audio.samplerate, settings.sample_rate, name)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise UserError(f"{name}: cannot be read as audio ({error}); repair or remove it") from error


def audio_seconds(path: Path) -> float:
    """Seconds of an audio file from its header; estimated from its size if the header has none, 0 if unreadable."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would block
            return 0.0
        with open(path, "rb") as file, opened_path(path, file) as audio:
            if audio.frames < MOST_FRAMES:
                return audio.frames / audio.samplerate
            # FLAC without a sample count: about one byte a sample.
            return path.stat().st_size / (audio.samplerate * audio.channels)
    except (soundfile.SoundFileError, RuntimeError, OSError):
        return 0.0


def _check_whole(audio: soundfile.SoundFile, there: Extent, name: str) -> None:
    """Raise UserError if a noticeable part of the sound in the header is missing from the file; warn if it may be."""
    missing, beyond = (round(audio.frames * size / max(1, there.held)) for size in (there.missing, there.beyond))
    if there.missing > _MISSING_BYTES and missing > _noticeable(audio, audio.frames + missing):
        raise UserError(
            f"{name}: cut short, {audio.frames} of about {audio.frames + missing} samples are there; fetch it again"
        )
    if there.unended:
        message = f"{name}: the last Ogg page does not end the stream: fetch it again if it was cut short"
        warnings.warn(message, SoundWarning, stacklevel=2)
    if there.beyond and not audio.frames:
        raise UserError(
            f"{name}: its header announces no sound, and {there.beyond} bytes follow: complete it, or fetch it again"
        )
    if beyond > TOLERANCE * audio.samplerate:
        message = (
            f"{name}: its header has {audio.frames / audio.samplerate:.2f} s of sound, and {there.beyond} bytes behind "
            "them are not read: if they are sound, correct the header (sox --ignore-length)"
        )
        warnings.warn(message, SoundWarning, stacklevel=2)


def _noticeable(audio: soundfile.SoundFile, announced: int) -> float:
    """Samples of the announced ones that must not be missing without a word."""
    return min(_MISSING_SHARE * announced, TOLERANCE * audio.samplerate)


def _decode(
    audio: soundfile.SoundFile, name: str, start: float, duration: float | None, channel: int | None
) -> Iterator[Tensor]:
    """One channel, or the mean of all, as the file has it: blocks of float32 [samples]."""
    if channel is not None and channel >= audio.channels:
        raise UserError(f"{name}: has {audio.channels} channels and no channel {channel} (from 0)")
    size = max(1, _READ_VALUES // audio.channels)
    wanted = most = audio.frames
    if stretch := duration is not None:
        wanted = round(duration * audio.samplerate)
        most = min(wanted, audio.frames - _seek(audio, start, name))
    samples, power = 0, _Power()
    # The file may hold less than its header announces. More is never read, and attempting it takes time.
    while samples < most and len(block := audio.read(min(size, most - samples), "float32", always_2d=True)):
        samples += len(block)
        # Column by column: thirty times as fast as numpy's mean over a short axis.
        columns = block.T if channel is None else block.T[channel : channel + 1]
        mono = torch.from_numpy(np.ascontiguousarray(sum(columns[1:], start=columns[0])))
        if len(columns) > 1:
            mono /= len(columns)
            power.add(columns, mono)
        if not torch.isfinite(mono.sum(dtype=torch.float64)):
            raise UserError(f"{name}: audio with NaN or infinite samples; repair or remove it")
        yield mono
    if samples == 0 and stretch and wanted:
        raise UserError(f"{name}: ends before the segment's start at {start} s")
    if samples == 0:
        raise UserError(f"{name}: holds no audio samples" + (f" in the segment of {duration} s" if stretch else ""))
    if stretch and samples < wanted - TOLERANCE * audio.samplerate:
        raise UserError(f"{name}: ends before the segment's end, {start} + {duration} s")
    if not stretch and wanted < MOST_FRAMES:
        # Compressed formats announce their length; some round it, by less than 1 %.
        if samples < (1 - _MISSING_SHARE) * wanted:
            raise UserError(f"{name}: cut short, {samples} of {wanted} samples could be read")
        if wanted - samples > max(_MISSING_FRAMES, _noticeable(audio, wanted)):
            message = f"{name}: {samples} of {wanted} samples could be read: fetch it again if it was cut short"
            warnings.warn(message, SoundWarning, stacklevel=2)
    power.check(name)


def _seek(audio: soundfile.SoundFile, start: float, name: str) -> int:
    """Seek to a segment's start and return it in samples. Raises UserError if the sound ends before it."""
    first = round(start * audio.samplerate)
    try:
        if first < audio.frames:
            return audio.seek(first)
    except soundfile.SoundFileError:
        if audio.frames < MOST_FRAMES:
            raise
    raise UserError(f"{name}: ends before the segment's start at {start} s")


class _Power:
    """Power of the channels of a recording and of their mean, each without its DC offset."""

    def __init__(self) -> None:
        self.sums = np.zeros((2, 0))  # of samples, of their squares; of every channel, then of the mean
        self.samples = self.channels = 0

    def add(self, columns: np.ndarray, mono: Tensor) -> None:
        """Add a block: float32 [channels, samples] and their mean [samples]."""
        signals = [torch.from_numpy(np.ascontiguousarray(column)) for column in columns] + [mono]
        sums = np.array([[signal.sum(dtype=torch.float64).item() for signal in signals],
                         [signal.square().sum(dtype=torch.float64).item() for signal in signals]])  # fmt: skip
        self.sums = sums if not self.samples else self.sums + sums
        self.samples, self.channels = self.samples + len(mono), len(columns)

    def check(self, name: str) -> None:
        """Issue a SoundWarning if the channels cancel each other out."""
        if not self.samples:
            return
        *channels, mean = self.sums[1] / self.samples - (self.sums[0] / self.samples) ** 2
        left = mean * len(channels) / sum(channels) if sum(channels) > 0 else 1.0
        if left < _CANCELLED / len(channels):
            message = (
                f"{name}: the channels cancel each other out (is one inverted?), {100 * max(0.0, left):.1f} % of their "
                "power is left in their mean: prepare with --features.channels first, or convert it to one channel"
            )
            warnings.warn(message, SoundWarning, stacklevel=2)


def resample(blocks: Iterable[Tensor | np.ndarray], rate: int, new_rate: int) -> Tensor:
    """All of `resample_blocks` in one tensor: float32 [samples] at new_rate."""
    return torch.cat(list(resample_blocks(map(torch.as_tensor, blocks), rate, new_rate)))


def resample_blocks(blocks: Iterable[Tensor], rate: int, new_rate: int, name: str = "audio") -> Iterator[Tensor]:
    """Resample mono float32 [samples] in blocks of any length, by torchaudio, to blocks at new_rate.

    Computed READ_SECONDS at a time, on a grid of its own, so that the numbers do not depend on the blocks. The sinc
    kernel is finite, so a stretch with enough context on both sides gives what one pass over everything would give.
    Raises UserError for a rate that has so little in common with new_rate that the kernel would fill the memory.
    """
    if rate == new_rate:
        yield from blocks
        return
    period, periods = rate // math.gcd(rate, new_rate), new_rate // math.gcd(rate, new_rate)
    if period * periods > _KERNEL_VALUES or rate < _LOWEST_RATE:
        raise UserError(f"{name}: {rate} Hz cannot be resampled to {new_rate} Hz; convert the file to a usual rate")
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
