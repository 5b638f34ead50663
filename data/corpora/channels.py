"""One channel of an audio file of several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

from data.corpora.base import Utterance
from data.errors import DataError
from data.features import FeatureSettings, resample_blocks
from data.index import Recording

_READ_FRAMES = 1 << 17


@dataclass(frozen=True)
class ChannelSource:
    """A channel of a file, or a stretch of it."""

    recording: Recording
    path: Path
    channel: int
    """Counts from 0."""
    start: float = 0.0
    """Seconds."""
    duration: float | None = None
    """Seconds; None: to the end."""

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> Utterance:
        """Read the channel, some seconds at a time. Raises DataError where the file cannot give it."""
        return Utterance.read(self.recording, self._blocks(features))

    def _blocks(self, features: FeatureSettings) -> Iterator[Tensor]:
        name = str(self.path)
        try:
            with soundfile.SoundFile(self.path) as audio:
                if self.channel >= audio.channels:
                    raise DataError(f"{name}: has {audio.channels} channels, and none of number {self.channel}")
                yield from resample_blocks(self._decode(audio), audio.samplerate, features.sample_rate, name)
        except (soundfile.SoundFileError, RuntimeError, OSError) as error:
            raise DataError(f"{name}: cannot be read as audio ({error}); repair or remove it") from error

    def _decode(self, audio: soundfile.SoundFile) -> Iterator[Tensor]:
        first = round(self.start * audio.samplerate)
        wanted = audio.frames - first if self.duration is None else round(self.duration * audio.samplerate)
        if first >= audio.frames:
            raise DataError(f"{self.path}: ends before the segment's start at {self.start} s")
        audio.seek(first)
        samples = 0
        size = max(1, _READ_FRAMES // audio.channels)
        while len(block := audio.read(min(size, wanted - samples), "float32", always_2d=True)):
            samples += len(block)
            mono = torch.from_numpy(np.ascontiguousarray(block[:, self.channel]))
            if not torch.isfinite(mono.sum(dtype=torch.float64)):
                raise DataError(f"{self.path}: audio with NaN or infinite samples; repair or remove it")
            yield mono
        if samples < wanted:
            raise DataError(f"{self.path}: ends before the segment's end, {samples} of {wanted} samples could be read")
