"""One channel of an audio file of several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.audio.reading import audio_blocks
from data.corpora.base import Utterance
from data.features import FeatureSettings
from data.format.schema import Recording


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
    warnings: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> Utterance:
        """Read the channel, some seconds at a time. Raises UserError where the file cannot give it."""
        sound = audio_blocks(self.path, features, None, self.start, self.duration, self.channel)
        return Utterance.read(self.recording, sound, self.warnings)
