"""Interface of a corpus: settings, a list of sources, and the utterance that a source loads.

A corpus module has a settings dataclass (the docstring under a field becomes its `--help`) and a function
`sources(settings)` that lists its recordings without reading audio. A source is small and picklable, is loaded in a
worker process, and gives the same values each time it is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from common.errors import UserError
from data.features import FeatureSettings
from data.recording import Recording

Split = Literal["train", "dev", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True)
class Utterance:
    """Loaded recording: its labels, and its audio at the sample rate of the feature settings."""

    recording: Recording
    audio: Tensor | Iterator[Tensor]
    """float32 [samples]: the whole waveform, or an iterator over its blocks, so that hours need not fit into memory."""
    warnings: tuple[str, ...] = ()
    """Problems with labels or audio, such as unusable word times; counted and listed by data.prepare."""

    @functools.cached_property
    def waveform(self) -> Tensor:
        """Whole audio, float32 [samples]. Consumes the blocks: use either this or `audio`."""
        return torch.as_tensor(self.audio) if hasattr(self.audio, "shape") else torch.cat(list(self.audio))

    @classmethod
    def read(cls, recording: Recording, blocks: Iterator[Tensor], warnings: tuple[str, ...] = ()) -> Utterance:
        """Utterance of a decoder's blocks. Reads up to two blocks, so that errors of short audio are raised here."""
        first = list(islice(blocks, 2))
        return cls(recording, first[0] if len(first) == 1 else chain(first, blocks), warnings)


@dataclass(frozen=True)
class FeatureUtterance:
    """Loaded recording with stored features. Its source checks that they match the requested settings."""

    recording: Recording
    log_mel: Tensor
    """float16 [frames, M]"""
    warnings: tuple[str, ...] = ()
    """See Utterance."""


class Source(Protocol):
    """Recording of a corpus that can be loaded."""

    @property
    def id(self) -> str: ...

    def load(self, features: FeatureSettings) -> Utterance | FeatureUtterance:
        """Read or synthesise the audio, or read stored features.

        Raises UserError if the recording is unusable: it is then skipped and counted.
        """
        ...


@dataclass(frozen=True)
class Unreadable:
    """Placeholder in a list of sources for a table row or file that gives no recording; skipped and counted.

    `mostly_readable` limits their share of a list.
    """

    id: str
    """Id of the recording if known, else its location, such as FILE:LINE."""
    reason: str

    def load(self, features: FeatureSettings) -> Utterance:
        """Raise UserError with the reason."""
        raise UserError(self.reason)


class MissingText(UserError):
    """Missing transcript when `text` is required: an error of the whole corpus, not of one row."""


def mostly_readable(rows: Sequence[object]) -> None:
    """Raise UserError, with the first reason, if half or more of the rows of a table are Unreadable."""
    unreadable = [row for row in rows if isinstance(row, Unreadable)]
    if unreadable:
        check_unusable(unreadable[0].reason, len(unreadable), len(rows))


def check_unusable(reason: str, unusable: int, rows: int) -> None:
    """Raise UserError, with the first reason, if half or more of the rows are unusable."""
    if 2 * unusable >= rows:
        raise UserError(reason if rows == 1 else f"{reason} ({unusable} of {rows} rows are unusable)")


@dataclass(frozen=True)
class Corpus:
    """Entry of the table of corpora."""

    summary: str
    """One line for the list of corpora."""
    settings: type
    """Settings dataclass."""
    sources: Callable[[Any], Iterable[Source]]
    """Settings -> all sources in a fixed order, with unique ids. Raises UserError for a user's mistake."""
    features: Callable[[Any], FeatureSettings] | None = None
    """Settings -> default feature settings, for a corpus with stored features."""
    free: tuple[str, ...] = ()
    """Settings that do not affect the recordings: a continued preparation may change them."""


def check_not_empty(field: str, values: Sequence[str], known: Iterable[str]) -> None:
    """Raise UserError, with the known values, if a list setting is empty."""
    if not values:
        raise UserError(f"{field} is empty: name at least one of {', '.join(known)}")
