"""Greedy CTC decoding: the best id of every frame, repeats collapsed, blanks dropped.

N sequences, T encoder frames, V vocabulary.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

BLANK = 0
"""The id of the CTC blank; tokenizers number their tokens from 1"""


@dataclass(frozen=True)
class TimedTokens:
    """The tokens of a sequence and the encoder frames that they came from."""

    ids: list[int]
    first_frame: list[int]
    """first frame of every token's run"""
    last_frame: list[int]
    """last frame of every token's run, inclusive"""
    confidence: list[float] = field(default_factory=list, compare=False)
    """probability that the model gave every token, 0 to 1: where it was emitted, of CTC the mean over its run; without
    what a language model adds. Empty where it is not known. Not compared: sums of another order differ in the last bit.
    Source: maximum probability, Laptev and Ginsburg 2022, arXiv 2212.08703, section 2."""


def greedy_ctc(scores: Tensor, lengths: Tensor, log_probs: Tensor | None = None) -> list[TimedTokens]:
    """Best path of every sequence, with the frames of its tokens.

    Args:
        scores: log-probabilities `[N, T, V]`, or ids int64 `[N, T]`.
        lengths: int64 `[N]` frames; what lies beyond is ignored.
        log_probs: of the ids, `[N, T]`, where ids are given; without them no confidence is known.
    """
    if scores.dim() == 3:
        log_probs, scores = scores.max(dim=-1)
    ids = scores.cpu().numpy()
    probabilities = [None] * len(ids) if log_probs is None else log_probs.double().exp().cpu().numpy()
    return [
        _collapse(row[:length], None if of_row is None else of_row[:length])
        for row, of_row, length in zip(ids, probabilities, lengths.tolist(), strict=True)
    ]


def _collapse(ids: np.ndarray, probabilities: np.ndarray | None) -> TimedTokens:
    change = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    first = np.concatenate([[0], change]) if len(ids) else change
    last = np.concatenate([change, [len(ids)]])[: len(first)] - 1
    kept = ids[first] != BLANK
    confidence = []
    if probabilities is not None and len(ids):
        confidence = (np.add.reduceat(probabilities, first) / (last - first + 1))[kept].tolist()
    return TimedTokens(ids[first][kept].tolist(), first[kept].tolist(), last[kept].tolist(), confidence)
