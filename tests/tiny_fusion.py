"""Simple reference implementations of a language model and of hot-word scores."""

import torch
from torch import Tensor


class Bigrams:
    """Language model of order 2 from a random table, which records the requested contexts."""

    order = 2

    def __init__(self, vocab_size: int) -> None:
        self.table = torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(5)).log_softmax(dim=1)
        self.table[:, 0] = torch.nan  # the blank must not be used
        self.contexts: list[tuple[int, ...]] = []

    def log_probs(self, context: tuple[int, ...]) -> Tensor:
        self.contexts.append(context)
        return self.table[context[-1] if context else 0]


def hot_word_score(phrases: list[tuple[tuple[int, ...], float]], labels: tuple[int, ...]) -> float:
    """Total weight of the matched labels, from left to right, with the longest phrase at each position."""
    total, position = 0.0, 0
    while position < len(labels):
        matches = [
            (len(phrase), weight) for phrase, weight in phrases if labels[position : position + len(phrase)] == phrase
        ]
        length, weight = max(matches, default=(1, 0.0))
        total, position = total + length * weight, position + length
    return total
