"""Source that reads an audio file, or a segment or channel of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.audio.reading import audio_blocks
from data.corpora.base import Utterance
from data.features import FeatureSettings
from data.recording import Recording


@dataclass(frozen=True)
class FileSource:
    """Recording in an audio file, with its labels."""

    recording: Recording
    path: Path
    start: float = 0.0
    """Start of the segment in seconds."""
    duration: float | None = None
    """Length of the segment in seconds; None for the whole file."""
    channel: int | None = None
    """Channel, from 0; None to convert the channels to one by the feature settings."""
    warnings: tuple[str, ...] = ()
    """Problems of the files with its labels; see Utterance."""

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> Utterance:
        """Open the file, a few seconds at a time. Raises UserError if it cannot be read."""
        blocks = audio_blocks(self.path, features, None, self.start, self.duration, self.channel)
        return Utterance.read(self.recording, blocks, self.warnings)
