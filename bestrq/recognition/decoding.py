"""Greedy CTC decoding: the best id of every frame, repeats collapsed, blanks dropped.

N sequences, T encoder frames, V vocabulary.
"""

from dataclasses import dataclass

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


def greedy_ctc_timed(scores: Tensor, lengths: Tensor) -> list[TimedTokens]:
    """Best path of every sequence, with the frames of its tokens.

    Args:
        scores: log-probabilities `[N, T, V]`, or ids int64 `[N, T]`.
        lengths: int64 `[N]` frames; what lies beyond is ignored.
    """
    ids = scores.argmax(dim=-1) if scores.dim() == 3 else scores
    return [_collapse(row[:length]) for row, length in zip(ids.cpu().numpy(), lengths.tolist(), strict=True)]


def greedy_ctc(scores: Tensor, lengths: Tensor) -> list[list[int]]:
    """Tokens of the best path of every sequence: `greedy_ctc_timed` without the times."""
    return [tokens.ids for tokens in greedy_ctc_timed(scores, lengths)]


def _collapse(ids: np.ndarray) -> TimedTokens:
    change = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    first = np.concatenate([[0], change]) if len(ids) else change
    last = np.concatenate([change, [len(ids)]])[: len(first)] - 1
    kept = ids[first] != BLANK
    return TimedTokens(ids[first][kept].tolist(), first[kept].tolist(), last[kept].tolist())
