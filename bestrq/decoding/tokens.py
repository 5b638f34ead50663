"""Tokens with times, and greedy CTC decoding: the most probable id of every frame, repeats collapsed, blanks removed.

N sequences, T encoder frames, V vocabulary.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

BLANK = 0
"""id of the CTC blank; tokenizers number their tokens from 1"""


@dataclass(frozen=True)
class TimedTokens:
    """Tokens of a sequence, with the encoder frames that emitted them."""

    ids: list[int]
    first_frame: list[int]
    """first frame of each token's run"""
    last_frame: list[int]
    """last frame of each token's run, inclusive"""
    confidence: list[float] = field(default_factory=list, compare=False)
    """model probability of each token at the frame that emitted it, 0 to 1; for CTC, the mean over the token's run.
    Scores of fusion are not included. Empty if unknown. Not compared, because a different summation order changes the
    last bit. Source: maximum probability, Laptev and Ginsburg 2022, arXiv 2212.08703, section 2."""


def greedy_ctc(scores: Tensor, lengths: Tensor, log_probs: Tensor | None = None) -> list[TimedTokens]:
    """Best path of each sequence, with the frames of its tokens.

    Args:
        scores: log-probabilities `[N, T, V]`, or ids int64 `[N, T]`.
        lengths: int64 `[N]`, number of valid frames.
        log_probs: log-probabilities of the ids `[N, T]`, if ids are given; without them, confidences are unknown.
    """
    if scores.dim() == 3:
        log_probs, scores = scores.max(dim=-1)
    ids = scores.cpu().numpy()
    probabilities = [None] * len(ids) if log_probs is None else log_probs.double().exp().cpu().numpy()
    return [
        _collapse(row[:length], None if row_probabilities is None else row_probabilities[:length])
        for row, row_probabilities, length in zip(ids, probabilities, lengths.tolist(), strict=True)
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
