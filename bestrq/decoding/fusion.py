"""What a beam search adds to the scores of labels: an external language model, a bonus, hot words (shallow fusion).

What a label adds depends on the labels before it only, by their context: the last few of them, which the language
model looks at, and how much of a hot word they have said. Contexts repeat, so their rows of V numbers are kept.

V vocabulary, the blank (0) included.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bestrq.decoding.hot_words import HotWords
from bestrq.decoding.tokens import BLANK

CACHE_BYTES = 64 << 20
"""room for the rows that a `Fusion` keeps"""

Context = tuple[tuple[int, ...], int]
"""the last labels, and the state of `HotWords`"""
NO_CONTEXT: Context = ((), 0)
"""of the begin"""


class LanguageModel(Protocol):
    """What shallow fusion needs of a language model over the same labels."""

    @property
    def order(self) -> int:
        """Labels that it looks at, the one that it predicts included."""

    def log_probs(self, context: tuple[int, ...]) -> Tensor:
        """Natural log-probabilities of every label after a context, float32 `[V]` on the CPU; that of 0 is not used.

        context: the last `order - 1` labels; fewer where the sequence begins.
        """


class Fusion:
    """A label adds weight * log p_language_model + bonus + what `HotWords` gives; the blank adds nothing.

    One may serve many searches: it keeps nothing but what it has worked out.

    Args:
        vocab_size: V.
        weight: factor of the language model's log-probabilities.
        bonus: of every label, in nats.
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
        self._place: dict[Context, int] = {}
        self._rows = torch.empty(max(256, CACHE_BYTES // (8 * vocab_size)), vocab_size, dtype=torch.float64)

    def advance(self, context: Context, label: int) -> Context:
        """The context behind one more label."""
        last, match = context
        if self._history:
            last = (*last, label)[-self._history :]
        return last, self.hot_words.advance(match, label)[0] if self.hot_words else 0

    def gains(self, contexts: Sequence[Context]) -> Tensor:
        """What labels add behind contexts: float64 `[len(contexts), V]` on the CPU, 0 for the blank."""
        if len(self._place) + len(contexts) > len(self._rows):
            self._place.clear()
            if len(contexts) > len(self._rows):
                self._rows = self._rows.new_empty(2 * len(contexts), self.vocab_size)
        return self._rows[[self._place_of(context) for context in contexts]]

    def gains_of(self, context: Context, labels: Sequence[int]) -> list[float]:
        """What some labels add behind a context."""
        if len(self._place) == len(self._rows):
            self._place.clear()
        row = self._rows[self._place_of(context)].numpy()
        return [float(row[label]) for label in labels]

    def unfinished(self, context: Context) -> float:
        """What sequences have been given for a hot word that they have begun, and must give back if they end here."""
        return self.hot_words.unfinished(context[1]) if self.hot_words else 0.0

    def _place_of(self, context: Context) -> int:
        place = self._place.get(context)
        if place is None:
            place = self._place[context] = len(self._place)
            self._rows[place] = self._work_out(*context)
        return place

    def _work_out(self, last: tuple[int, ...], match: int) -> Tensor:
        if self.language_model:
            row = self.language_model.log_probs(last).to(torch.float64, copy=True).mul_(self.weight).add_(self.bonus)
        else:
            row = torch.full((self.vocab_size,), self.bonus, dtype=torch.float64)
        if self.hot_words:
            other, matching = self.hot_words.gains(match)
            gains = torch.full_like(row, other)
            gains[list(matching)] = torch.tensor(list(matching.values()), dtype=torch.float64)
            row += gains
        row[BLANK] = 0.0
        return row
