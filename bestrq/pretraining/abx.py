"""ABX discrimination: of two tokens A and B, the one of the category of X should be nearer to X.

Schatz et al. 2013, "Evaluating speech features with the Minimal-Pair ABX task: Analysis of the classical MFC/PLP
pipeline". Within speakers, A, B and X have one speaker; across speakers, A and B have one and X another. The distance
is the mean angle of the frames along the path of dynamic time warping. X is in another recording than A and B, so that
a recording's noise does not help.

K tokens, P pairs, T frames of a token, D features.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAIRS_PER_CALL = 4096


@dataclass(frozen=True)
class Tokens:
    """Tokens to compare, K numbers each."""

    category: Sequence[int]
    """word or phone"""
    speaker: Sequence[int]
    recording: Sequence[int]


def draw_triples(tokens: Tokens, number: int, across: bool, seed: int) -> np.ndarray:
    """Triples (A, B, X) of token numbers, int64 `[at most number, 3]`; empty if no triple is possible.

    Categories and speakers are drawn uniformly, then tokens: a frequent word has no larger weight (Schatz et al. 2013
    average over contrasts).
    """
    rng = np.random.default_rng(seed)
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)  # tokens by speaker and category
    for token, (category, speaker) in enumerate(zip(tokens.category, tokens.speaker, strict=True)):
        groups[speaker, category].append(token)
    categories: dict[int, list[int]] = defaultdict(list)  # categories by speaker
    speakers: dict[int, list[int]] = defaultdict(list)  # speakers by category
    for speaker, category in sorted(groups):
        categories[speaker].append(category)
        speakers[category].append(speaker)
    usable = [
        (speaker, category)
        for speaker, category in sorted(groups)
        if len(categories[speaker]) > 1
        and (len(speakers[category]) > 1 if across else len(groups[speaker, category]) > 1)
    ]
    triples: list[list[int]] = []
    for _ in range(4 * number if usable else 0):  # some draws have X in the recording of A or B
        if len(triples) == number:
            break
        speaker, category = usable[rng.integers(len(usable))]
        others = [other for other in categories[speaker] if other != category]
        x_speakers = [other for other in speakers[category] if other != speaker] if across else [speaker]
        a = rng.choice(groups[speaker, category])
        b = rng.choice(groups[speaker, others[rng.integers(len(others))]])
        x = rng.choice(groups[x_speakers[rng.integers(len(x_speakers))], category])
        if tokens.recording[x] not in (tokens.recording[a], tokens.recording[b]):
            triples.append([int(a), int(b), int(x)])
    return np.array(triples, dtype=np.int64).reshape(-1, 3)


def abx_errors(features: Sequence[Tensor], triples: np.ndarray) -> np.ndarray:
    """1 for every triple in which B is nearer to X than A, 0.5 for equal distances, else 0; float64 `[P]`.

    Args:
        features: frames of every token, `[T, D]`.
        triples: int64 `[P, 3]`.
    """
    a, b, x = triples.T.tolist()
    distance = warped_distances(features, [*zip(a, x, strict=True), *zip(b, x, strict=True)])
    to_a, to_b = distance[: len(a)], distance[len(a) :]
    return ((to_a > to_b).double() + 0.5 * (to_a == to_b).double()).numpy()


def warped_distances(features: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Distance of every pair of tokens, from 0 (equal directions) to 1 (opposite), float64 `[P]`."""
    unit = [F.normalize(frames.double(), dim=-1) for frames in features]
    blocks = [pairs[start : start + PAIRS_PER_CALL] for start in range(0, len(pairs), PAIRS_PER_CALL)]
    return torch.cat([_warp(unit, block) for block in blocks]) if blocks else torch.zeros(0, dtype=torch.float64)


def _warp(unit: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Dynamic time warping of all pairs at once; padding lies behind the last frames, which no path leaves."""
    first = torch.nn.utils.rnn.pad_sequence([unit[i] for i, _ in pairs], batch_first=True)
    second = torch.nn.utils.rnn.pad_sequence([unit[j] for _, j in pairs], batch_first=True)
    angle = (first @ second.mT).clamp(-1, 1).arccos() / math.pi
    total, steps = torch.full_like(angle, math.inf), torch.zeros_like(angle)
    for i in range(angle.shape[1]):
        for j in range(angle.shape[2]):
            before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
            inside = [(k, m) for k, m in before if k >= 0 and m >= 0]
            if not inside:
                total[:, 0, 0], steps[:, 0, 0] = angle[:, 0, 0], 1
                continue
            cost, chosen = torch.stack([total[:, k, m] for k, m in inside]).min(dim=0)
            length = torch.stack([steps[:, k, m] for k, m in inside]).gather(0, chosen[None])[0]
            total[:, i, j], steps[:, i, j] = cost + angle[:, i, j], length + 1
    rows = torch.arange(len(pairs))
    ends = torch.tensor([[len(unit[i]) - 1, len(unit[j]) - 1] for i, j in pairs])
    return total[rows, ends[:, 0], ends[:, 1]] / steps[rows, ends[:, 0], ends[:, 1]]
