"""Estimating an n-gram model by interpolated Witten-Bell smoothing, and writing it as an ARPA file.

Source: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998, section 2.5; the
method is Witten and Bell 1991. It has no parameters and is defined on any amount of data. With N(h) the words seen
after history h, T(h) the different ones among them and h' the history without its first word,

    p(w | h) = (count(h, w) + T(h) p(w | h')) / (N(h) + T(h)),

and below the unigrams stands the uniform distribution. A word never seen after h gets T(h) / (N(h) + T(h)) p(w | h'),
so that factor is the back-off weight of h: the ARPA file holds the interpolated probabilities exactly.

All is held in memory; for billions of tokens take KenLM's lmplz, whose files are read as well.
"""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bestrq.decoding.ngram import BEGIN, END, Words
from common.errors import UserError
from common.files import write_file

NEVER = -99.0
"""what stands for the log10 of 0 in ARPA files: nothing predicts <s>"""


@dataclass(frozen=True)
class Estimate:
    """Probabilities and back-off weights. Words are numbered as in `ngram.Words`: V is </s>, V + 1 is <s>."""

    vocab_size: int
    """V, the blank included"""
    probabilities: list[dict[Words, float]]
    """of every n-gram seen and of all unigrams, by order from 1 on: of its last word after the others"""
    backoff: dict[Words, float]
    """T / (N + T) of every history seen, the empty one included"""

    @property
    def num_ngrams(self) -> list[int]:
        """Number of n-grams in the file, by order from 1 on."""
        counts = [len(table) for table in self.probabilities]
        return [counts[0] + 1, *counts[1:]]  # <s> has a line among the unigrams


def train_ngram(sequences: Iterable[Sequence[int]], order: int, vocab_size: int) -> Estimate:
    """Interpolated Witten-Bell estimate from sequences of labels in 1 .. vocab_size - 1.

    Every sequence begins after <s> and ends with </s>. Labels never seen have a probability too. Raises UserError
    for an order below 1 and for no sequences at all, ValueError for a label that cannot be.
    """
    if order < 1:
        raise UserError(f"order = {order}: give 1 or more")
    counts = _count(sequences, order, vocab_size)
    if not counts[0]:
        raise UserError("no text to train a language model on: give texts")
    tokens: Counter[Words] = Counter()
    types: Counter[Words] = Counter()
    for table in counts:
        for ngram, count in table.items():
            tokens[ngram[:-1]] += count
            types[ngram[:-1]] += 1
    backoff = {history: types[history] / (tokens[history] + types[history]) for history in tokens}

    ngrams: Iterable[Words] = [(word,) for word in range(1, vocab_size + 1)]  # every label and </s>, seen or not
    below: dict[Words, float] = {(): 1 / vocab_size}
    probabilities = []
    for n, table in enumerate(counts, 1):
        found = {}
        for ngram in ngrams:
            history = ngram[:-1]
            seen = table[ngram] / (tokens[history] + types[history])
            found[ngram] = seen + backoff[history] * below[ngram[1:]]
        probabilities.append(found)
        below = found
        ngrams = counts[n] if n < order else ()
    return Estimate(vocab_size, probabilities, backoff)


def write_arpa(path: str | Path, estimate: Estimate, pieces: Sequence[str]) -> None:
    """Write an ARPA file, gzipped where the name ends in .gz. Whole or not at all, under its final name.

    Args:
        pieces: how every label is written, `[V]`, distinct and without white space.
    """
    path = Path(path)
    names = [*pieces, END, BEGIN]
    begin = (estimate.vocab_size + 1,)
    lines = ["\\data\\", *(f"ngram {n}={count}" for n, count in enumerate(estimate.num_ngrams, 1))]
    for n, table in enumerate(estimate.probabilities, 1):
        lines += ["", f"\\{n}-grams:"]
        if n == 1:
            lines.append(_line(NEVER, begin, estimate.backoff, names))
        lines += [_line(math.log10(table[ngram]), ngram, estimate.backoff, names) for ngram in sorted(table)]
    content = "\n".join([*lines, "", "\\end\\", ""]).encode()
    write_file(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _count(sequences: Iterable[Sequence[int]], order: int, vocab_size: int) -> list[Counter[Words]]:
    """How often every n-gram occurs, by order from 1 on; <s> is only ever a history."""
    counts: list[Counter[Words]] = [Counter() for _ in range(order)]
    for labels in sequences:
        if labels and not 1 <= min(labels) <= max(labels) < vocab_size:
            raise ValueError(f"labels from {min(labels)} to {max(labels)}: need 1 .. {vocab_size - 1}")
        words = (vocab_size + 1, *labels, vocab_size)
        for end in range(2, len(words) + 1):
            for n in range(1, min(order, end) + 1):
                counts[n - 1][words[end - n : end]] += 1
    return counts


def _line(log10: float, ngram: Words, backoff: dict[Words, float], names: Sequence[str]) -> str:
    weight = f"\t{math.log10(backoff[ngram]):.9g}" if ngram in backoff else ""
    return f"{log10:.9g}\t{' '.join(names[word] for word in ngram)}{weight}"
