"""Hot words: phrases of which a recogniser is told that they are likely to be said.

Every label of a hypothesis that goes on with a phrase adds that phrase's weight to its score; if the phrase breaks off,
what its labels have added is taken back. What remains in the end is, for every phrase that was said, its weight times
its labels. Where phrases overlap, the one that begins first counts, and of those that begin together the longest.

Phrases are sequences of labels: one begins and ends where its labels do, be it within a word.

Source: shallow-fusion contextual biasing over subword units, with weights taken back: Zhao et al. 2019, "Shallow-Fusion
End-to-End Contextual Biasing", Interspeech; as an automaton with failure arcs: Aho and Corasick 1975.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bestrq.decoding.tokens import BLANK
from common.errors import UserError
from common.text import fold


class HotWords:
    """A trie of phrases, made an automaton: a state (0 at the begin) is what has been said of a phrase.

    Args:
        phrases: labels and weight of each, in nats for a label. Of phrases given twice, the higher weight is taken;
            labels at the begin of several phrases count as those with the highest, until it is known which it is.

    Raises:
        ValueError: a phrase has no labels, or the blank; or a weight is not a positive number.
    """

    def __init__(self, phrases: Sequence[tuple[Sequence[int], float]]) -> None:
        self._next: list[dict[int, int]] = [{}]
        weight = [0.0]  # of the label that leads to a state
        whole = [0.0]  # what the phrase adds that ends in a state
        sequences: list[tuple[int, ...]] = [()]
        for labels, of_label in phrases:
            if not labels or BLANK in labels or not 0 < of_label < math.inf:
                raise ValueError(f"labels {list(labels)} with a weight of {of_label} are no hot word")
            state = 0
            for label in labels:
                if label not in self._next[state]:
                    self._next[state][label] = len(self._next)
                    self._next.append({})
                    weight.append(0.0)
                    whole.append(0.0)
                    sequences.append((*sequences[state], label))
                state = self._next[state][label]
                weight[state] = max(weight[state], of_label)
            whole[state] = max(whole[state], of_label * len(labels))
        self._added = [0.0] * len(weight)
        self._fall: list[tuple[int, float]] = [(0, 0.0)] * len(weight)
        self._follow(weight, whole, sequences)
        self._gains: dict[int, tuple[float, dict[int, float]]] = {}

    def _follow(self, weight: list[float], whole: list[float], sequences: list[tuple[int, ...]]) -> None:
        """What every state has been given; and where it falls when its phrase breaks off, with what that adds."""
        kept = [0.0] * len(weight)  # by the longest phrase that a state begins with
        rest: list[tuple[int, ...]] = [()] * len(weight)  # labels behind that phrase
        for state in sorted(range(len(weight)), key=lambda one: len(sequences[one])):
            for label, child in self._next[state].items():
                self._added[child] = whole[child] or self._added[state] + weight[child]
                kept[child] = whole[child] or kept[state]
                rest[child] = () if whole[child] else (*rest[state], label)
            if state == 0:
                continue
            # Said again from the begin: what lies behind the phrase; or, if there was none, behind the first label.
            again, gained = 0, kept[state] - self._added[state]
            for label in rest[state] if kept[state] else sequences[state][1:]:
                again, gain = self.advance(again, label)  # has fewer labels than this state: is known
                gained += gain
            self._fall[state] = (again, gained)

    def advance(self, state: int, label: int) -> tuple[int, float]:
        """The state behind one more label, and what the label adds."""
        gained = 0.0
        while label not in self._next[state]:
            if state == 0:
                return 0, gained
            state, gain = self._fall[state]
            gained += gain
        child = self._next[state][label]
        return child, gained + self._added[child] - self._added[state]

    def gains(self, state: int) -> tuple[float, dict[int, float]]:
        """What a label adds with which no phrase goes on or begins; and what those add with which one does."""
        if state not in self._gains:
            labels = set(self._next[0])
            at = state
            while at:
                labels |= set(self._next[at])
                at = self._fall[at][0]
            # The blank is in no phrase.
            self._gains[state] = self.advance(state, BLANK)[1], {one: self.advance(state, one)[1] for one in labels}
        return self._gains[state]

    def unfinished(self, state: int) -> float:
        """What a label with which no phrase goes on would take back."""
        return -self.gains(state)[0]


def read_hot_words(path: str | os.PathLike[str], encode: Callable[[str], Sequence[int]], weight: float) -> HotWords:
    """Hot words of a file: UTF-8, a phrase a line; behind a tab may stand its weight in nats for a label.

    Args:
        encode: the tokenizer's function from text to labels. Phrases are written as in its training labels; apostrophe
            variants are unified and invisible characters removed (`common.text.fold`).
        weight: of phrases that have none.

    Raises:
        UserError: the file cannot be read or has no phrases; or a line is wrong, which is named.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"decoder.hot_words = {path}: cannot be read ({error}): give a text file in UTF-8") from error
    phrases = []
    for number, line in enumerate(lines, 1):
        phrase, *fields = (part.strip() for part in line.split("\t"))
        if not phrase and not any(fields):
            continue
        try:
            of_label = float(fields[0]) if fields else weight
            phrases.append((list(encode(fold(phrase))), of_label))
            HotWords(phrases[-1:])
        except ValueError as error:
            raise UserError(
                f"decoder.hot_words = {path}, line {number}: {error}; write a phrase in characters that the recogniser "
                "knows, and behind a tab its weight, a positive number, or nothing"
            ) from error
        if len(fields) > 1:
            raise UserError(
                f"decoder.hot_words = {path}, line {number}: more than one tab; write a phrase, a tab, a weight"
            )
    if not phrases:
        raise UserError(f"decoder.hot_words = {path} has no phrases: write one a line")
    return HotWords(phrases)
