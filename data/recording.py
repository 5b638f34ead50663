"""Metadata of a recording, as corpora give it and datasets store it."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError
from data.names import name_fault
from data.transcripts import Word


@dataclass(frozen=True)
class Recording:
    """Metadata of a recording. Empty strings and None mean "unknown"."""

    id: str
    """Unique in the dataset; also the name of the tensor."""
    text: str | None = None
    """Transcript."""
    words: list[Word] | None = None
    """Words with their times, sorted by start."""
    language: str = ""
    """Language code as given by the corpus ('en', 'cs', ...)."""
    speaker: str = ""
    """Speaker id."""
    split: str = "train"
    """'train', 'dev' or 'test'."""
    excluded: list[tuple[float, float]] | None = None
    """(start, end) in seconds of passages that are in the audio but not in `text`. They are excluded from labelled
    training and scoring, but not from pretraining, which needs no labels. None: no such passages."""

    def __post_init__(self) -> None:
        fault = "is reserved by the shard format" if self.id == "__metadata__" else name_fault(self.id)
        if fault is not None:
            raise UserError(f"recording id {self.id!r} {fault}: give it another name")
