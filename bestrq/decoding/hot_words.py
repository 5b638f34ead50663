"""Hot words: phrases whose labels get a higher score in a beam search.

Each label that continues a phrase adds the phrase's weight to the score of a hypothesis. If the phrase is not
completed, these weights are subtracted again, so that only complete phrases raise the final score, by weight times
number of labels. Of overlapping phrases, the one that starts first counts; of those with the same start, the longest.

Phrases are label sequences: they match at label boundaries, also within a word.

Source: shallow-fusion contextual biasing over subword units, with weights taken back: Zhao et al. 2019, "Shallow-Fusion
End-to-End Contextual Biasing", Interspeech; as an automaton with failure arcs: Aho and Corasick 1975.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from bestrq.decoding.tokens import BLANK
from common.errors import UserError
from common.files import read_bounded
from common.text import fold

MAX_PHRASE = 1000
"""longest phrase, in characters: memory is quadratic in it"""


class HotWords:
    """Automaton of phrases: a trie with failure arcs. A state is the part of a phrase that has matched; 0 is none.

    Args:
        phrases: labels of each phrase, and its weight in nats per label. The higher weight is taken for a phrase that
            occurs twice. A common prefix of several phrases has the highest of their weights until they differ.

    Raises:
        ValueError: a phrase has no labels, or contains the blank; or a weight is not a positive finite number.
    """

    def __init__(self, phrases: Sequence[tuple[Sequence[int], float]]) -> None:
        self._next: list[dict[int, int]] = [{}]
        label_weight = [0.0]  # of the label that leads to each state
        phrase_score = [0.0]  # of the phrase that ends in each state, 0 if none does
        prefixes: list[tuple[int, ...]] = [()]
        for labels, weight in phrases:
            if not labels or BLANK in labels or not 0 < weight < math.inf:
                raise ValueError(f"labels {list(labels)} with a weight of {weight} are not a valid hot word")
            state = 0
            for label in labels:
                if label not in self._next[state]:
                    self._next[state][label] = len(self._next)
                    self._next.append({})
                    label_weight.append(0.0)
                    phrase_score.append(0.0)
                    prefixes.append((*prefixes[state], label))
                state = self._next[state][label]
                label_weight[state] = max(label_weight[state], weight)
            phrase_score[state] = max(phrase_score[state], weight * len(labels))
        self._total = [0.0] * len(label_weight)
        """score added on the path to each state"""
        self._failure: list[tuple[int, float]] = [(0, 0.0)] * len(label_weight)
        """target of each state's failure arc, and the score that taking it adds"""
        self._add_failure_arcs(label_weight, phrase_score, prefixes)
        self._scores: dict[int, tuple[float, dict[int, float]]] = {}

    def _add_failure_arcs(
        self, label_weight: list[float], phrase_score: list[float], prefixes: list[tuple[int, ...]]
    ) -> None:
        """Compute the total score of each state, and its failure arc."""
        kept = [0.0] * len(prefixes)  # score of the longest complete phrase that the state's prefix starts with
        rest: list[tuple[int, ...]] = [()] * len(prefixes)  # labels after that phrase
        for state in sorted(range(len(prefixes)), key=lambda state: len(prefixes[state])):
            for label, child in self._next[state].items():
                self._total[child] = phrase_score[child] or self._total[state] + label_weight[child]
                kept[child] = phrase_score[child] or kept[state]
                rest[child] = () if phrase_score[child] else (*rest[state], label)
            if state == 0:
                continue
            # Matching restarts after the complete phrase; without one, after the first label.
            target, added = 0, kept[state] - self._total[state]
            for label in rest[state] if kept[state] else prefixes[state][1:]:
                # The arcs of these states exist already: they have fewer labels.
                target, score = self.advance(target, label)
                added += score
            self._failure[state] = (target, added)

    def advance(self, state: int, label: int) -> tuple[int, float]:
        """Return the state after one more label, and the score that the label adds."""
        added = 0.0
        while label not in self._next[state]:
            if state == 0:
                return 0, added
            state, score = self._failure[state]
            added += score
        child = self._next[state][label]
        return child, added + self._total[child] - self._total[state]

    def scores(self, state: int) -> tuple[float, dict[int, float]]:
        """Score of a label that neither continues nor starts a phrase, and the scores of the labels that do."""
        if state not in self._scores:
            labels = set(self._next[0])
            ancestor = state
            while ancestor:
                labels |= set(self._next[ancestor])
                ancestor = self._failure[ancestor][0]
            # The blank is in no phrase.
            mismatch = self.advance(state, BLANK)[1]
            self._scores[state] = mismatch, {label: self.advance(state, label)[1] for label in labels}
        return self._scores[state]

    def partial_match(self, state: int) -> float:
        """Score of an incomplete match, which is subtracted again at a label that matches no phrase."""
        return -self.scores(state)[0]


def read_hot_words(path: str | os.PathLike[str], encode: Callable[[str], Sequence[int]], weight: float) -> HotWords:
    """Read hot words from a UTF-8 file: one phrase per line, optionally followed by a tab and a weight per label.

    Args:
        encode: the tokenizer's function from text to labels. Phrases are written like its training labels; apostrophe
            variants are unified and invisible characters removed (`common.text.fold`).
        weight: default weight in nats per label.

    Raises:
        UserError: the file cannot be read, has no phrases, or has an invalid line, which the message names.
    """
    try:
        lines = read_bounded(Path(path)).decode("utf-8-sig").splitlines()
    except ValueError as error:  # UserError, UnicodeDecodeError
        raise UserError(f"decoder.hot_words = {path}: cannot be read ({error}): give a text file in UTF-8") from error
    phrases = []
    for number, line in enumerate(lines, 1):
        phrase, *fields = (part.strip() for part in line.split("\t"))
        if not phrase and not any(fields):
            continue
        if len(phrase) > MAX_PHRASE:
            raise UserError(
                f"decoder.hot_words = {path}, line {number}: a phrase of {len(phrase):,} characters; give at most "
                f"{MAX_PHRASE:,}"
            )
        try:
            phrases.append((list(encode(fold(phrase))), float(fields[0]) if fields else weight))
            HotWords(phrases[-1:])
        except ValueError as error:
            raise UserError(
                f"decoder.hot_words = {path}, line {number}: {error}; write a phrase in characters of the tokenizer, "
                "optionally followed by a tab and a positive weight"
            ) from error
        if len(fields) > 1:
            raise UserError(
                f"decoder.hot_words = {path}, line {number}: more than one tab; write a phrase, a tab, a weight"
            )
    if not phrases:
        raise UserError(f"decoder.hot_words = {path} has no phrases: write one per line")
    return HotWords(phrases)
