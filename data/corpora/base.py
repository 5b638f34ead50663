"""The one shape of a corpus: settings, a list of sources, and what a source gives when it is loaded.

A corpus module has a settings dataclass (a docstring under every field becomes `--help`) and a function
`sources(settings)` that lists what there is without reading any sound. A source is small, can be sent to another
process, and is loaded there; loading the same source twice gives the same numbers.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.errors import UserError, did_you_mean
from data.audio.reading import audio_blocks
from data.features import FeatureSettings
from data.format.schema import Recording

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Utterance:
    """A loaded recording: what is known of it, and its sound, at the feature settings' sample rate."""

    recording: Recording
    sound: Tensor | Iterator[Tensor]
    """float32 [samples]: all of them, or blocks of them in order, so that hours need not be held."""
    warnings: tuple[str, ...] = ()
    """Problems with labels or audio, such as unusable word times; counted and listed by data.prepare."""

    @functools.cached_property
    def waveform(self) -> Tensor:
        """float32 [samples]: all of the sound in one tensor. Ask for it or read the blocks, not both."""
        return torch.as_tensor(self.sound) if hasattr(self.sound, "shape") else torch.cat(list(self.sound))

    @classmethod
    def read(cls, recording: Recording, blocks: Iterator[Tensor], warnings: tuple[str, ...] = ()) -> Utterance:
        """From a decoder's blocks. What is wrong with the beginning of the sound, or a short one, is raised here."""
        first = list(islice(blocks, 2))
        return cls(recording, first[0] if len(first) == 1 else chain(first, blocks), warnings)


@dataclass(frozen=True)
class FeatureUtterance:
    """A loaded recording whose features were computed elsewhere; its source sees that they are those asked for."""

    recording: Recording
    log_mel: Tensor
    """float16 [frames, M]"""
    warnings: tuple[str, ...] = ()
    """As in Utterance."""


class Source(Protocol):
    """One recording that a corpus can give."""

    @property
    def id(self) -> str: ...

    def load(self, features: FeatureSettings) -> Utterance | FeatureUtterance:
        """Read or make the sound, or read the features.

        Raises UserError where this one recording is unusable: it is skipped and counted.
        """
        ...


@dataclass(frozen=True)
class Unreadable:
    """Stands in a list of sources for a table row or a file that gives no recording; it is skipped and counted.

    `mostly_readable` limits their share of a list.
    """

    id: str
    """Id of the recording if known, else its location, such as FILE:LINE."""
    reason: str

    def load(self, features: FeatureSettings) -> Utterance:
        """Raises UserError with the reason."""
        raise UserError(self.reason)


class MissingText(UserError):
    """A recording without a transcript when `text` is required: an error of the whole corpus, not of one row."""


def mostly_readable(listed: Sequence[object]) -> None:
    """Raise UserError, with the first reason, if half or more of a table's rows are Unreadable."""
    bad = [row for row in listed if isinstance(row, Unreadable)]
    if bad:
        check_unusable(bad[0].reason, len(bad), len(listed))


def check_unusable(reason: str, unusable: int, rows: int) -> None:
    """Raise UserError, with the reason of the first one, if half or more of the rows are unusable."""
    if 2 * unusable >= rows:
        raise UserError(reason if rows == 1 else f"{reason} ({unusable} of {rows} rows are unusable)")


@dataclass(frozen=True)
class FileSource:
    """A recording that is a whole audio file, with what is known of it."""

    recording: Recording
    path: Path
    warnings: tuple[str, ...] = ()
    """As in Utterance; found in the files beside the audio."""

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> Utterance:
        return Utterance.read(self.recording, audio_blocks(self.path, features), self.warnings)


@dataclass(frozen=True)
class SegmentSource:
    """A stretch of an audio file, times in seconds."""

    recording: Recording
    path: Path
    start: float
    duration: float
    warnings: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.recording.id

    def load(self, features: FeatureSettings) -> Utterance:
        """Read the stretch alone, as a file is read. Raises UserError when the file cannot give it."""
        sound = audio_blocks(self.path, features, None, self.start, self.duration)
        return Utterance.read(self.recording, sound, self.warnings)


@dataclass(frozen=True)
class Corpus:
    """A corpus as `data.prepare` sees it."""

    summary: str
    """One line for the list of corpora."""
    settings: type
    """The settings dataclass."""
    sources: Callable[[Any], Iterable[Source]]
    """Settings -> everything the corpus has, in a fixed order, ids unique. Raises UserError for a user's mistake."""
    features: Callable[[Any], FeatureSettings] | None = None
    """Settings -> the features that its stored numbers have, for a corpus that is not all sound."""
    free: tuple[str, ...] = ()
    """Settings that decide nothing about the recordings: a continued preparation may change them."""


def hash_share(key: str) -> float:
    """A number in [0, 1) that depends on the text alone: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def check_choice(field: str, value: str, known: Sequence[str]) -> None:
    """Raise UserError unless the value is one of the known ones."""
    if value not in known:
        raise UserError(f"{field} is {value!r}, known are {', '.join(known)}.{did_you_mean(value, known)}")
