"""Shallow fusion: language model, length bonus and hot words, added to the label scores of a beam search.

The score added to a label depends on the labels before it only through their context: the last labels in the history
of the language model, and the state of the hot-word automaton. Contexts repeat, so their rows of V scores are cached.

V vocabulary, the blank (0) included.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bestrq.decoding.hot_words import HotWords
from bestrq.decoding.tokens import BLANK

CACHE_BYTES = 64 << 20
"""size of the row cache of a `Fusion`"""

Context = tuple[tuple[int, ...], int]
"""last labels, and state of `HotWords`"""
NO_CONTEXT: Context = ((), 0)
"""context at the start of a sequence"""


class LanguageModel(Protocol):
    """Language model over the labels of the recogniser."""

    @property
    def order(self) -> int:
        """Maximum n-gram length: order - 1 labels of history."""

    def log_probs(self, context: tuple[int, ...]) -> Tensor:
        """Natural log-probability of each label after a context, float32 `[V]` on the CPU; the entry of the blank is
        unused.

        Args:
            context: the last `order - 1` labels; fewer at the start of a sequence.
        """


class Fusion:
    """Scores added to labels: weight * log p_language_model + length bonus + `HotWords`; the blank gets 0.

    May be shared by several searches; its only state is a cache.

    Args:
        vocab_size: V.
        weight: factor of the language model's log-probabilities.
        bonus: length bonus per label, in nats.
    """

    def __init__(
        self,
        vocab_size: int,
        language_model: LanguageModel | None = None,
        weight: float = 0.0,
        bonus: float = 0.0,
        hot_words: HotWords | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.weight = weight
        self.bonus = bonus
        self.language_model = language_model if weight != 0 else None
        self.hot_words = hot_words
        self._history = self.language_model.order - 1 if self.language_model else 0
        self._row_of_context: dict[Context, int] = {}
        self._rows = torch.empty(max(256, CACHE_BYTES // (8 * vocab_size)), vocab_size, dtype=torch.float64)

    def advance(self, context: Context, label: int) -> Context:
        """Return the context after one more label."""
        last, state = context
        if self._history:
            last = (*last, label)[-self._history :]
        return last, self.hot_words.advance(state, label)[0] if self.hot_words else 0

    def scores(self, contexts: Sequence[Context]) -> Tensor:
        """Score of each label after each context, float64 `[len(contexts), V]` on the CPU; 0 for the blank."""
        if len(self._row_of_context) + len(contexts) > len(self._rows):
            self._row_of_context.clear()
            if len(contexts) > len(self._rows):
                self._rows = self._rows.new_empty(2 * len(contexts), self.vocab_size)
        return self._rows[[self._row_index(context) for context in contexts]]

    def label_scores(self, context: Context, labels: Sequence[int]) -> list[float]:
        """Scores of some labels after one context."""
        if len(self._row_of_context) == len(self._rows):
            self._row_of_context.clear()
        row = self._rows[self._row_index(context)].numpy()
        return [float(row[label]) for label in labels]

    def partial_match(self, context: Context) -> float:
        """Score that sequences have received for an incomplete hot word, and lose if they end here."""
        return self.hot_words.partial_match(context[1]) if self.hot_words else 0.0

    def _row_index(self, context: Context) -> int:
        index = self._row_of_context.get(context)
        if index is None:
            index = self._row_of_context[context] = len(self._row_of_context)
            self._rows[index] = self._compute_row(*context)
        return index

    def _compute_row(self, last: tuple[int, ...], state: int) -> Tensor:
        if self.language_model:
            row = self.language_model.log_probs(last).to(torch.float64, copy=True).mul_(self.weight).add_(self.bonus)
        else:
            row = torch.full((self.vocab_size,), self.bonus, dtype=torch.float64)
        if self.hot_words:
            mismatch, matches = self.hot_words.scores(state)
            scores = torch.full_like(row, mismatch)
            scores[list(matches)] = torch.tensor(list(matches.values()), dtype=torch.float64)
            row += scores
        row[BLANK] = 0.0
        return row
