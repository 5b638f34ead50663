"""Label sequences that the hypotheses of a beam share, and what a beam search finds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

from bestrq.decoding.fusion import NO_CONTEXT, Context, Fusion
from bestrq.decoding.tokens import BLANK, TimedTokens


@dataclass(frozen=True)
class Hypothesis:
    """What may have been said."""

    tokens: TimedTokens
    """times and confidences of the likeliest of its alignments that the search kept"""
    score: float
    """natural log-probability, summed over the alignments, with what language model, bonus and hot words have added"""


class Rescorer(Protocol):
    """Judges the hypotheses of a recording once more, such as with a language model too slow for the search."""

    def __call__(self, hypotheses: Sequence[Hypothesis]) -> Sequence[float]:
        """New scores, one for each of the hypotheses, which come best first: the highest wins, of equals the first."""


def choose(hypotheses: Sequence[Hypothesis], rescorer: Rescorer | None = None) -> Hypothesis:
    """The best of hypotheses, of which there is at least one.

    Raises:
        ValueError: the rescorer has not given one score for each.
    """
    scores = [one.score for one in hypotheses] if rescorer is None else list(rescorer(hypotheses))
    if len(scores) != len(hypotheses):
        raise ValueError(f"the rescorer gave {len(scores)} scores for {len(hypotheses)} hypotheses")
    return hypotheses[max(range(len(scores)), key=scores.__getitem__)]


def ranked(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Best first."""
    return sorted(hypotheses, key=lambda one: -one.score)


class Labels:
    """A sequence of labels, as the last one and those before. Made by `Interned` only: equal ones are the same."""

    __slots__ = ("before", "label", "number", "context", "__weakref__")

    def __init__(self, before: "Labels | None", label: int, number: int, context: Context) -> None:
        self.before, self.label, self.number, self.context = before, label, number, context


class Interned:
    """Label sequences that some hypothesis begins with, each once; others are forgotten.

    Args:
        fusion: for the context that every sequence ends in.
    """

    def __init__(self, fusion: Fusion | None = None) -> None:
        self.fusion = fusion
        self._numbers = itertools.count()
        self._known: WeakValueDictionary[tuple[int, int], Labels] = WeakValueDictionary()
        self.empty = Labels(None, BLANK, next(self._numbers), NO_CONTEXT)

    def extended(self, before: Labels, label: int) -> Labels:
        """The sequence with one more label. Its number is its own: equal numbers are equal sequences."""
        labels = self._known.get((before.number, label))
        if labels is None:
            context = self.fusion.advance(before.context, label) if self.fusion else NO_CONTEXT
            labels = self._known[before.number, label] = Labels(before, label, next(self._numbers), context)
        return labels

    def unfinished(self, labels: Labels) -> float:
        """What a sequence loses that ends here: see `Fusion.unfinished`."""
        return self.fusion.unfinished(labels.context) if self.fusion else 0.0

    def __len__(self) -> int:
        """Sequences that are known, the empty one aside."""
        return len(self._known)
