"""N-gram language models over a tokenizer's tokens, read from ARPA files: what shallow fusion adds to a recogniser.

The words of the file are the tokenizer's pieces ("\\u2581the", "a"), one for every id, as `Tokenizer.pieces` gives
them; KenLM's lmplz and SRILM write such a file from texts whose pieces are separated by spaces, tools/train_ngram.py
writes one itself. A probability is given for the n-grams that the file lists; another one backs off (Katz 1987):

    log p(w | h) = the value of (h, w) where it is listed, else backoff(h) + log p(w | h without its first word),

with backoff(h) = 0 where h is not listed. Numbers in the file are base 10, here they are natural logarithms.

V vocabulary, the blank (0) included.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from array import array
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from bestrq.decoding.tokens import BLANK
from common.errors import UserError

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
FLOOR = -100 * math.log(10)
"""log-probability of what neither the file nor an <unk> in it gives one to; KenLM takes the same"""
CACHE_BYTES = 64 << 20
"""room for the vectors that `NGram.log_probs` keeps"""

Words = tuple[int, ...]
"""Numbers of words: labels 0 .. V - 1, then V for </s>, V + 1 for <s> and, where no piece is <unk>, V + 2 for <unk>"""


class NGram:
    """A back-off n-gram model. `read_arpa` makes one.

    Args:
        order: length of the longest n-grams; the model sees order - 1 labels back.
        vocab_size: V.
        unknown: number of the word <unk>.
        followers: for every history the words listed after it and their log-probabilities; () has the unigrams.
        backoff: back-off weights of histories, natural logarithms; a history that is not there has 0.
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
        listed, log_probs = followers.get((), (array("i"), array("f")))
        self._unigrams = np.full(vocab_size + 3, FLOOR)
        self._unigrams[np.asarray(listed)] = log_probs
        # What the file does not list is <unk> to it, as the next word and in a history alike.
        labels_and_end = np.arange(vocab_size + 1)
        self._word_of = np.where(np.isin(labels_and_end, listed), labels_and_end, unknown)
        self._word_of_label: list[int] = self._word_of.tolist()
        # Of [V + 1], </s> last. The contexts of a search repeat, above all among the hypotheses of one beam.
        self._after = lru_cache(max(256, CACHE_BYTES // (4 * vocab_size + 4)))(self._work_out)

    def log_probs(self, context: Sequence[int]) -> Tensor:
        """Log-probabilities of every next label, float32 `[V]` on the CPU; -inf for the blank.

        Args:
            context: all labels so far, or at least the last order - 1 of them; fewer stand at the beginning of a text.

        The tensor is shared with later calls: do not change it in place. Labels and </s> together have probability 1.
        """
        return self._after(self._history(context))[:-1]

    def end_log_prob(self, context: Sequence[int]) -> float:
        """Log-probability that the text ends after `context`."""
        return float(self._after(self._history(context))[-1])

    def _history(self, context: Sequence[int]) -> Words:
        last = tuple(self._word_of_label[label] for label in context[max(0, len(context) - self.order + 1) :])
        return (self.vocab_size + 1, *last) if len(last) < self.order - 1 else last

    def _work_out(self, history: Words) -> Tensor:
        scores = self._unigrams.copy()
        for start in reversed(range(len(history))):  # ever longer histories: what they list overrides the shorter ones
            suffix = history[start:]
            scores += self._backoff.get(suffix, 0.0)
            if suffix in self._followers:
                words, log_probs = self._followers[suffix]
                scores[np.asarray(words)] = log_probs
        after = torch.from_numpy(scores[self._word_of]).float()
        after[BLANK] = -torch.inf
        return after


def perplexity(model: NGram, sequences: Iterable[Sequence[int]]) -> float:
    """exp of the mean negative log-probability of a token; the end of every sequence is one."""
    total, tokens = 0.0, 0
    for labels in sequences:
        for i, label in enumerate(labels):
            context = labels[max(0, i - model.order + 1) : i]  # no more: a text may be an hour long
            total += float(model.log_probs(context)[label])
        total += model.end_log_prob(labels)
        tokens += len(labels) + 1
    return math.exp(-total / tokens)


def read_arpa(path: str | os.PathLike[str], pieces: Sequence[str]) -> NGram:
    """The model of an ARPA file, plain or gzipped (`.gz`).

    Args:
        pieces: how the file writes every id, `[V]`, all distinct, without white space; pieces[0] is the blank, which no
            word of the file may be. A piece that is <unk> is the label of that name.
    Raises:
        UserError: the file cannot be read, is no ARPA file, is cut off, or holds a word that is no piece. The message
            names the file, the line and what to do.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            return _parse(_Lines(path, cast(BinaryIO, stream)), pieces)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"the language model {path} cannot be read ({error}): write it again") from error


class _Lines:
    """The lines of a file that are not blank, stripped, and which one is in hand."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self.number = 0
        self._stream = stream

    def next(self) -> bytes:
        """The next line; empty at the end of the file."""
        for line in self._stream:
            self.number += 1
            if line := line.strip():
                return line
        return b""

    def error(self, problem: str) -> UserError:
        return UserError(f"the language model {self.path}, line {self.number}: {problem}")


def _parse(lines: _Lines, pieces: Sequence[str]) -> NGram:
    numbers, unknown = _number_words(pieces)
    counts, line = _read_counts(lines)
    followers: dict[Words, tuple[array[int], array[float]]] = {}
    backoff: dict[Words, float] = {}
    for n, count in enumerate(counts, 1):
        if line != b"\\%d-grams:" % n:
            raise lines.error(f"\\{n}-grams: must stand here, not {_shown(line)}; write the file again")
        found = 0
        while (line := lines.next()) and not line.startswith(b"\\"):
            found += 1
            log_prob, words, weight = _read_ngram(line, n, numbers, lines)
            listed, log_probs = followers.setdefault(words[:-1], (array("i"), array("f")))
            listed.append(words[-1])
            log_probs.append(log_prob)
            if weight:
                backoff[words] = weight
        if found != count:
            where = "before this line" if line else "up to the end of the file"
            raise lines.error(
                f"{found} {n}-grams {where}, but the list below \\data\\ says {count}: the file is cut off or was "
                "changed; write it again"
            )
    if line != b"\\end\\":
        raise lines.error(
            f"\\end\\ must stand here, not {_shown(line)}: the file is cut off or has more; write it again"
        )
    return NGram(len(counts), len(pieces), unknown, followers, backoff)


def _number_words(pieces: Sequence[str]) -> tuple[dict[bytes, int], int]:
    """The number of every word that a file may hold, and that of <unk>. Kept as bytes: no line is decoded."""
    numbers = {piece.encode(): label for label, piece in enumerate(pieces)}
    if len(numbers) < len(pieces) or {BEGIN.encode(), END.encode()} & numbers.keys():
        raise UserError("the tokenizer writes two labels in one way, or one as <s> or </s>: train it again")
    del numbers[pieces[BLANK].encode()]
    unknown = numbers.setdefault(UNKNOWN.encode(), len(pieces) + 2)
    return {b"<UNK>": unknown, **numbers, END.encode(): len(pieces), BEGIN.encode(): len(pieces) + 1}, unknown


def _read_counts(lines: _Lines) -> tuple[list[int], bytes]:
    """How many n-grams of every order there are, and the line after that."""
    while (line := lines.next()) != b"\\data\\":  # tools write remarks before it
        if not line:
            raise lines.error(
                "no ARPA file: it has no line \\data\\. Give the ARPA file that lmplz, SRILM or tools/train_ngram.py "
                "writes, not a binary made of it"
            )
    counts: list[int] = []
    while (line := lines.next()).startswith(b"ngram"):
        fields = re.fullmatch(rb"ngram\s+(\d{1,3})\s*=\s*(\d{1,18})", line)
        if not fields or int(fields[1]) != len(counts) + 1:
            raise lines.error(
                f"ngram {len(counts) + 1}=COUNT must stand here, not {_shown(line)}; write the file again"
            )
        counts.append(int(fields[2]))
    if not counts:
        raise lines.error("ngram 1=COUNT must follow \\data\\; write the file again")
    return counts, line


def _read_ngram(line: bytes, n: int, numbers: dict[bytes, int], lines: _Lines) -> tuple[float, Words, float]:
    """Log-probability, words and back-off weight (0 where there is none) of a line."""
    fields = line.split()
    if len(fields) not in (n + 1, n + 2):
        raise lines.error(
            f"a log-probability, {n} words and perhaps a back-off weight must stand here, not {_shown(line)}; "
            "write the file again"
        )
    try:
        words = tuple([numbers[word] for word in fields[1 : n + 1]])
    except KeyError as error:
        raise lines.error(
            f"the word {_shown(error.args[0])} is no piece of the tokenizer: train the language model on texts that "
            "are split with the tokenizer of this recogniser, as tools/train_ngram.py --export does"
        ) from None
    # A weight may be above 1; one above 10^100 is damage, and such sums would leave float32.
    weight = _natural_log(fields[n + 1], 100, lines) if len(fields) == n + 2 else 0.0
    return _natural_log(fields[0], 0, lines), words, weight


def _natural_log(field: bytes, highest: float, lines: _Lines) -> float:
    try:
        value = float(field)
    except ValueError:
        value = math.nan
    if not value <= highest:  # false for NaN too
        raise lines.error(f"a logarithm up to {highest} must stand in place of {_shown(field)}; write the file again")
    return value * math.log(10)


def _shown(text: bytes) -> str:
    return repr(text[:80].decode(errors="replace")) if text else "the end of the file"
