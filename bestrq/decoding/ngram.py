"""N-gram language models over a tokenizer's tokens: ARPA files, scoring for shallow fusion, and estimation.

The words of an ARPA file are the tokenizer's pieces ("\\u2581the", "a"), one per id, as in `Tokenizer.pieces`. KenLM's
lmplz and SRILM write such a file from texts whose pieces are separated by spaces; tools/train_ngram.py writes one
without them. The n-grams in the file have their own probabilities; all others back off (Katz 1987):

    log p(w | h) = the value of (h, w) if it is in the file, else backoff(h) + log p(w | h without its first word),

with backoff(h) = 0 if h is not in the file. Logarithms are base 10 in the file, natural in memory.

V vocabulary, the blank (0) included.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import stat
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from bestrq.decoding.tokens import BLANK
from common.errors import UserError
from common.files import write_file
from common.json_lines import bounded_lines

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
FLOOR = -100 * math.log(10)
"""log-probability of a word that is not in the file, if <unk> is not either; KenLM uses the same value"""
LOG10_ZERO = -99.0
"""log10 of 0 in ARPA files, for <s>, which is never predicted"""
CACHE_BYTES = 64 << 20
"""size of the cache of `NGram.log_probs`"""
MAX_LINE, MAX_LEFT_OUT = 1 << 16, 10_000
"""bytes of a line of an ARPA file, and number of its blank lines and comments"""

Words = tuple[int, ...]
"""word numbers: labels 0 .. V - 1, V for </s>, V + 1 for <s> and, if no piece is <unk>, V + 2 for <unk>"""


class NGram:
    """Back-off n-gram model, made by `read_arpa`.

    Args:
        order: maximum n-gram length: order - 1 labels of history.
        vocab_size: V.
        unknown: number of the word <unk>.
        followers: words after each history in the file, with their log-probabilities; () has the unigrams.
        backoff: back-off weights of histories, natural logarithms; 0 for a history that is missing.
    """

    def __init__(
        self,
        order: int,
        vocab_size: int,
        unknown: int,
        followers: dict[Words, tuple[array[int], array[float]]],
        backoff: dict[Words, float],
    ) -> None:
        self.order = order
        self.vocab_size = vocab_size
        self._followers = followers
        self._backoff = backoff
        unigrams, log_probs = followers.get((), (array("i"), array("f")))
        self._unigrams = np.full(vocab_size + 3, FLOOR)
        self._unigrams[np.asarray(unigrams)] = log_probs
        # Words without a unigram are <unk>, both as the next word and in a history.
        labels_and_end = np.arange(vocab_size + 1)
        self._word_of = np.where(np.isin(labels_and_end, unigrams), labels_and_end, unknown)
        self._word_of_label: list[int] = self._word_of.tolist()
        # Rows of [V + 1], </s> last. Contexts repeat in a search, above all among the hypotheses of one beam.
        self._row = lru_cache(max(256, CACHE_BYTES // (4 * vocab_size + 4)))(self._compute_row)

    def log_probs(self, context: Sequence[int]) -> Tensor:
        """Log-probability of each next label, float32 `[V]` on the CPU; -inf for the blank.

        The tensor is shared with later calls: do not change it in place. Probabilities of labels and </s> sum to 1.

        Args:
            context: all labels so far, or at least the last order - 1; fewer stand for the start of a text.
        """
        return self._row(self._history(context))[:-1]

    def end_log_prob(self, context: Sequence[int]) -> float:
        """Log-probability that the text ends after `context`."""
        return float(self._row(self._history(context))[-1])

    def _history(self, context: Sequence[int]) -> Words:
        last = tuple(self._word_of_label[label] for label in context[max(0, len(context) - self.order + 1) :])
        return (self.vocab_size + 1, *last) if len(last) < self.order - 1 else last

    def _compute_row(self, history: Words) -> Tensor:
        scores = self._unigrams.copy()
        for start in reversed(range(len(history))):  # from short to long histories, whose values override earlier ones
            suffix = history[start:]
            scores += self._backoff.get(suffix, 0.0)
            if suffix in self._followers:
                words, log_probs = self._followers[suffix]
                scores[np.asarray(words)] = log_probs
        row = torch.from_numpy(scores[self._word_of]).float()
        row[BLANK] = -torch.inf
        return row


def perplexity(model: NGram, sequences: Iterable[Sequence[int]]) -> float:
    """exp of the mean negative log-probability per token; the end of each sequence counts as a token."""
    total, tokens = 0.0, 0
    for labels in sequences:
        for i, label in enumerate(labels):
            context = labels[max(0, i - model.order + 1) : i]  # short slices: a text may have an hour of labels
            total += float(model.log_probs(context)[label])
        total += model.end_log_prob(labels)
        tokens += len(labels) + 1
    return math.exp(-total / tokens)


# --- reading ARPA files


def read_arpa(path: str | os.PathLike[str], pieces: Sequence[str]) -> NGram:
    """Read an ARPA file, plain or gzipped (`.gz`).

    Args:
        pieces: piece of each id, `[V]`, distinct and without white space. pieces[0] is the blank, which the file must
            not contain. If a piece is <unk>, the file's <unk> is this label.

    Raises:
        UserError: the file cannot be read, is not an ARPA file, is truncated, or contains a word that is not a piece.
            The message names the file, the line and the fix.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device may never end
            raise OSError("not a regular file")
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            return _parse(_Lines(path, cast(BinaryIO, stream)), pieces)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"the language model {path} cannot be read ({error}): write it again") from error


class _Lines:
    """Lines of a file, stripped, without blank ones, and the number of the current line."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self.number = 0
        self._lines = bounded_lines(stream, f"the language model {path}", MAX_LINE)
        self._left_out = 0  # blank lines and comments

    def next(self) -> bytes:
        """Return the next line; empty at the end of the file."""
        for line in self._lines:
            self.number += 1
            if line := line.strip():
                return line
            self.leave_out()
        return b""

    def leave_out(self) -> None:
        """Count a line without content, as a few compressed bytes can stand for any number of them."""
        self._left_out += 1
        if self._left_out > MAX_LEFT_OUT:
            raise self.error(f"more than {MAX_LEFT_OUT:,} blank lines and comments; write the file again")

    def error(self, problem: str) -> UserError:
        return UserError(f"the language model {self.path}, line {self.number}: {problem}")


def _parse(lines: _Lines, pieces: Sequence[str]) -> NGram:
    numbers, unknown = _number_words(pieces)
    counts, line = _read_counts(lines)
    followers: dict[Words, tuple[array[int], array[float]]] = {}
    backoff: dict[Words, float] = {}
    for n, expected in enumerate(counts, 1):
        if line != b"\\%d-grams:" % n:
            raise lines.error(f"expected \\{n}-grams:, not {_quote(line)}; write the file again")
        count = 0
        while (line := lines.next()) and not line.startswith(b"\\"):
            count += 1
            if count > expected:
                raise lines.error(
                    f"at least {count} {n}-grams, but the counts after \\data\\ say {expected}: the file was changed; "
                    "write it again"
                )
            log_prob, words, weight = _read_ngram(line, n, numbers, lines)
            next_words, log_probs = followers.setdefault(words[:-1], (array("i"), array("f")))
            next_words.append(words[-1])
            log_probs.append(log_prob)
            if weight:
                backoff[words] = weight
        if count != expected:
            end = "before this line" if line else "up to the end of the file"
            raise lines.error(
                f"{count} {n}-grams {end}, but the counts after \\data\\ say {expected}: the file is truncated or was "
                "changed; write it again"
            )
    if line != b"\\end\\":
        raise lines.error(
            f"expected \\end\\, not {_quote(line)}: the file is truncated or has extra lines; write it again"
        )
    return NGram(len(counts), len(pieces), unknown, followers, backoff)


def _number_words(pieces: Sequence[str]) -> tuple[dict[bytes, int], int]:
    """Number of each word that a file may contain, and the number of <unk>. Bytes, so that lines are not decoded."""
    numbers = {piece.encode(): label for label, piece in enumerate(pieces)}
    if len(numbers) < len(pieces) or {START.encode(), END.encode()} & numbers.keys():
        raise UserError("the tokenizer has two labels with the same piece, or a piece <s> or </s>: train it again")
    del numbers[pieces[BLANK].encode()]
    unknown = numbers.setdefault(UNKNOWN.encode(), len(pieces) + 2)
    return {b"<UNK>": unknown, **numbers, END.encode(): len(pieces), START.encode(): len(pieces) + 1}, unknown


def _read_counts(lines: _Lines) -> tuple[list[int], bytes]:
    """Number of n-grams of each order, and the line after the counts."""
    while (line := lines.next()) != b"\\data\\":  # tools write comments before it
        if not line:
            raise lines.error(
                "not an ARPA file: it has no line \\data\\. Give the ARPA file that lmplz, SRILM or "
                "tools/train_ngram.py writes, not a binary made from it"
            )
        lines.leave_out()
    counts: list[int] = []
    while (line := lines.next()).startswith(b"ngram"):
        fields = re.fullmatch(rb"ngram\s+(\d{1,3})\s*=\s*(\d{1,18})", line)
        if not fields or int(fields[1]) != len(counts) + 1:
            raise lines.error(f"expected ngram {len(counts) + 1}=COUNT, not {_quote(line)}; write the file again")
        counts.append(int(fields[2]))
    if not counts:
        raise lines.error("expected ngram 1=COUNT after \\data\\; write the file again")
    return counts, line


def _read_ngram(line: bytes, n: int, numbers: dict[bytes, int], lines: _Lines) -> tuple[float, Words, float]:
    """Log-probability, words and back-off weight of a line; the weight is 0 if the line has none."""
    fields = line.split()
    if len(fields) not in (n + 1, n + 2):
        raise lines.error(
            f"expected a log-probability, {n} words and an optional back-off weight, not {_quote(line)}; "
            "write the file again"
        )
    try:
        words = tuple([numbers[word] for word in fields[1 : n + 1]])
    except KeyError as error:
        raise lines.error(
            f"the word {_quote(error.args[0])} is not a piece of the tokenizer: train the language model on texts "
            "split with the tokenizer of this recogniser, as tools/train_ngram.py --export does"
        ) from None
    # A weight may be above 1; one above 10^100 means a damaged file, and sums of such weights would overflow float32.
    weight = _natural_log(fields[n + 1], 100, lines) if len(fields) == n + 2 else 0.0
    return _natural_log(fields[0], 0, lines), words, weight


def _natural_log(field: bytes, maximum: float, lines: _Lines) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not value <= maximum:  # also refuses NaN
        raise lines.error(f"expected a logarithm of at most {maximum}, not {_quote(field)}; write the file again")
    return value * math.log(10)


def _quote(text: bytes) -> str:
    return repr(text[:80].decode(errors="replace")) if text else "the end of the file"


# --- estimation


@dataclass(frozen=True)
class Estimate:
    """Probabilities and back-off weights of an n-gram model."""

    vocab_size: int
    """V, the blank included"""
    probabilities: list[dict[Words, float]]
    """by order from 1 on: p(last word | words before), for each n-gram in the data and all unigrams"""
    backoff: dict[Words, float]
    """back-off weight of each history in the data, including the empty one"""

    @property
    def num_ngrams(self) -> list[int]:
        """Number of n-grams in the file, by order from 1 on."""
        counts = [len(table) for table in self.probabilities]
        return [counts[0] + 1, *counts[1:]]  # <s> is also among the unigrams


def train_ngram(sequences: Iterable[Sequence[int]], order: int, vocab_size: int) -> Estimate:
    """Estimate an n-gram model with interpolated Witten-Bell smoothing.

    Source: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998, section 2.5;
    the method is Witten and Bell 1991. It has no parameters and is defined for any amount of data. With N(h) words
    observed after history h, T(h) distinct ones among them, and h' the history without its first word,

        p(w | h) = (count(h, w) + T(h) p(w | h')) / (N(h) + T(h)),

    with the uniform distribution below the unigrams. A word not observed after h gets T(h) / (N(h) + T(h)) p(w | h'),
    so this factor is the back-off weight of h: an ARPA file holds the interpolated probabilities exactly.

    All counts are held in memory; for billions of tokens, use KenLM's lmplz, whose files `read_arpa` reads too.

    Args:
        sequences: labels in 1 .. vocab_size - 1; each sequence is framed by <s> and </s>. Labels that do not occur get
            a probability too.

    Raises:
        UserError: the order is below 1, or there are no sequences.
        ValueError: a label is out of range.
    """
    if order < 1:
        raise UserError(f"order = {order}: give 1 or more")
    counts = _count_ngrams(sequences, order, vocab_size)
    if not counts[0]:
        raise UserError("no text to train a language model on: give texts")
    tokens: Counter[Words] = Counter()
    types: Counter[Words] = Counter()
    for table in counts:
        for ngram, count in table.items():
            tokens[ngram[:-1]] += count
            types[ngram[:-1]] += 1
    backoff = {history: types[history] / (tokens[history] + types[history]) for history in tokens}

    ngrams: Iterable[Words] = [(word,) for word in range(1, vocab_size + 1)]  # all labels and </s>
    lower_order: dict[Words, float] = {(): 1 / vocab_size}
    probabilities = []
    for n, table in enumerate(counts, 1):
        of_order = {}
        for ngram in ngrams:
            history = ngram[:-1]
            observed = table[ngram] / (tokens[history] + types[history])
            of_order[ngram] = observed + backoff[history] * lower_order[ngram[1:]]
        probabilities.append(of_order)
        lower_order = of_order
        ngrams = counts[n] if n < order else ()
    return Estimate(vocab_size, probabilities, backoff)


def write_arpa(path: str | Path, estimate: Estimate, pieces: Sequence[str]) -> None:
    """Write an ARPA file atomically; gzipped if the name ends in .gz.

    Args:
        pieces: piece of each label, `[V]`, distinct and without white space.
    """
    path = Path(path)
    names = [*pieces, END, START]
    lines = ["\\data\\", *(f"ngram {n}={count}" for n, count in enumerate(estimate.num_ngrams, 1))]
    for n, table in enumerate(estimate.probabilities, 1):
        lines += ["", f"\\{n}-grams:"]
        if n == 1:
            lines.append(_format_ngram(LOG10_ZERO, (estimate.vocab_size + 1,), estimate.backoff, names))
        lines += [_format_ngram(math.log10(table[ngram]), ngram, estimate.backoff, names) for ngram in sorted(table)]
    content = "\n".join([*lines, "", "\\end\\", ""]).encode()
    write_file(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _count_ngrams(sequences: Iterable[Sequence[int]], order: int, vocab_size: int) -> list[Counter[Words]]:
    """Counts of n-grams by order from 1 on; <s> occurs only in histories."""
    counts: list[Counter[Words]] = [Counter() for _ in range(order)]
    for labels in sequences:
        if labels and not 1 <= min(labels) <= max(labels) < vocab_size:
            raise ValueError(f"labels from {min(labels)} to {max(labels)}: need 1 .. {vocab_size - 1}")
        words = (vocab_size + 1, *labels, vocab_size)
        for end in range(2, len(words) + 1):
            for n in range(1, min(order, end) + 1):
                counts[n - 1][words[end - n : end]] += 1
    return counts


def _format_ngram(log10: float, ngram: Words, backoff: dict[Words, float], names: Sequence[str]) -> str:
    weight = f"\t{math.log10(backoff[ngram]):.9g}" if ngram in backoff else ""
    return f"{log10:.9g}\t{' '.join(names[word] for word in ngram)}{weight}"
