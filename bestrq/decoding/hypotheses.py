"""Hypotheses of a beam search, rescoring, and the label sequences that hypotheses share."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

from bestrq.decoding.fusion import NO_CONTEXT, Context, Fusion
from bestrq.decoding.tokens import BLANK, TimedTokens


@dataclass(frozen=True)
class Hypothesis:
    """Beam-search hypothesis."""

    tokens: TimedTokens
    """times and confidences of its most probable alignment among those that the search kept"""
    score: float
    """natural log-probability, summed over alignments, plus the scores of language model, length bonus and hot words"""


class Rescorer(Protocol):
    """Second-pass scoring of the hypotheses of a recording, such as with a language model too slow for the search."""

    def __call__(self, hypotheses: Sequence[Hypothesis]) -> Sequence[float]:
        """Return one score per hypothesis. The highest score wins; of equal scores, the first.

        Args:
            hypotheses: sorted by score, best first.
        """


def best_hypothesis(hypotheses: Sequence[Hypothesis], rescorer: Rescorer | None = None) -> Hypothesis:
    """Best of one or more hypotheses, after rescoring if a rescorer is given.

    Raises:
        ValueError: the rescorer did not return one score per hypothesis.
    """
    scores = [hypothesis.score for hypothesis in hypotheses] if rescorer is None else list(rescorer(hypotheses))
    if len(scores) != len(hypotheses):
        raise ValueError(f"the rescorer returned {len(scores)} scores for {len(hypotheses)} hypotheses")
    return hypotheses[max(range(len(scores)), key=scores.__getitem__)]


def sort_hypotheses(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Sort hypotheses by score, best first."""
    return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)


class LabelSequence:
    """Label sequence: its last label, and the sequence before. Only a `SequenceTable` makes one, each of them once."""

    __slots__ = ("before", "label", "number", "context", "__weakref__")

    def __init__(self, before: "LabelSequence | None", label: int, number: int, context: Context) -> None:
        self.before, self.label, self.number, self.context = before, label, number, context


class SequenceTable:
    """Table with one object per label sequence. Sequences that no hypothesis starts with are garbage-collected.

    Args:
        fusion: for the fusion context at the end of each sequence.
    """

    def __init__(self, fusion: Fusion | None = None) -> None:
        self.fusion = fusion
        self._numbers = itertools.count()
        self._sequences: WeakValueDictionary[tuple[int, int], LabelSequence] = WeakValueDictionary()
        self.empty = LabelSequence(None, BLANK, next(self._numbers), NO_CONTEXT)

    def extend(self, before: LabelSequence, label: int) -> LabelSequence:
        """Return the sequence with one more label. Two sequences are equal if and only if their numbers are."""
        sequence = self._sequences.get((before.number, label))
        if sequence is None:
            context = self.fusion.advance(before.context, label) if self.fusion else NO_CONTEXT
            sequence = LabelSequence(before, label, next(self._numbers), context)
            self._sequences[before.number, label] = sequence
        return sequence

    def partial_match(self, sequence: LabelSequence) -> float:
        """Score that a hypothesis loses if it ends here: see `Fusion.partial_match`."""
        return self.fusion.partial_match(sequence.context) if self.fusion else 0.0

    def __len__(self) -> int:
        """Number of sequences in the table, without the empty one."""
        return len(self._sequences)
