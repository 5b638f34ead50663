"""Matches between the labels of a long transcript and of greedy decoding, in linear memory: `match_labels`.

The algorithm is a patience diff. Stretches of labels that occur exactly once in both sequences are paired, and the
longest chain of pairs that increases in both is kept. This is repeated between the links of the chain, where more
stretches are unique and shorter ones suffice, because chance matches are less probable.

Shapes: U labels of the transcript, H decoded labels. Time O((U + H) log (U + H)) per level, memory O(U + H).
"""

import math
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]

MAX_LEVELS = 12
# Language is more repetitive than independent labels: stretches are longer than chance requires by this factor.
_LENGTH_FACTOR = 1.5
# Expected number of chance matches.
_CHANCE = 0.01


def match_labels(text: Labels, decoded: Labels) -> Labels:
    """Position of the decoded label that matches each transcript label, or -1; int64 `[U]`.

    Matched positions strictly increase. A negative transcript label has no match.
    """
    matched = np.full(len(text), -1, np.int64)
    regions = [(0, len(text), 0, len(decoded), 0)]
    while regions:
        start, stop, decoded_start, decoded_stop, level = regions.pop()
        part, decoded_part = text[start:stop], decoded[decoded_start:decoded_stop]
        length = stretch_length(part, decoded_part)
        if level == MAX_LEVELS or min(len(part), len(decoded_part)) < length:
            continue
        pairs = _longest_increasing_chain(_unique_pairs(part, decoded_part, length))
        if not len(pairs):
            continue
        # A stretch gives `length` matched labels. If two stretches contradict each other, the first one wins.
        places = (pairs[:, :1] + np.arange(length)).ravel() + start
        partners = (pairs[:, 1:] + np.arange(length)).ravel() + decoded_start
        before = np.maximum.accumulate(np.concatenate([[start - 1], places]))[:-1]
        decoded_before = np.maximum.accumulate(np.concatenate([[decoded_start - 1], partners]))[:-1]
        kept = (places > before) & (partners > decoded_before)
        places, partners = places[kept], partners[kept]
        matched[places] = partners
        edges = zip(
            np.concatenate([[start], places + 1]).tolist(),
            np.concatenate([places, [stop]]).tolist(),
            np.concatenate([[decoded_start], partners + 1]).tolist(),
            np.concatenate([partners, [decoded_stop]]).tolist(),
            strict=True,
        )
        regions += [(*edge, level + 1) for edge in edges if edge[0] < edge[1] and edge[2] < edge[3]]
    return matched


def stretch_length(text: Labels, decoded: Labels) -> int:
    """Number of labels above which two sequences of these lengths rarely share a stretch by chance."""
    if not len(text) or not len(decoded):
        return 1
    _, counts = np.unique(text, return_counts=True)
    equal = min(float(np.square(counts / len(text)).sum()), 0.5)  # probability that two random labels are equal
    return max(3, math.ceil(_LENGTH_FACTOR * math.log(len(text) * len(decoded) / _CHANCE) / -math.log(equal)))


def _unique_pairs(text: Labels, decoded: Labels, length: int) -> Labels:
    """Positions `[n, 2]` of the stretches that occur exactly once in both, sorted by the position in the text."""
    keys, places = _unique_stretches(text, length)
    decoded_keys, decoded_places = _unique_stretches(decoded, length)
    _, first, second = np.intersect1d(keys, decoded_keys, assume_unique=True, return_indices=True)
    pairs = np.stack([places[first], decoded_places[second]], axis=1)
    pairs = pairs[np.argsort(pairs[:, 0])]
    # Keys are hashes: remove pairs whose labels differ.
    offsets = np.arange(length)
    return pairs[(text[pairs[:, :1] + offsets] == decoded[pairs[:, 1:] + offsets]).all(axis=1)]


def _unique_stretches(labels: Labels, length: int) -> tuple[NDArray[np.uint64], Labels]:
    """Hash and position of every stretch that occurs exactly once."""
    weights = np.random.default_rng(0).integers(0, 2**63, length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    count = len(labels) - length + 1
    keys = np.zeros(count, np.uint64)
    for offset, weight in enumerate(weights):  # one label of all stretches at a time: memory O(n), not O(n * length)
        keys += labels[offset : offset + count].astype(np.uint64) * weight
    keys, places, counts = np.unique(keys, return_index=True, return_counts=True)
    return keys[counts == 1], places[counts == 1]


def _longest_increasing_chain(pairs: Labels) -> Labels:
    """Longest chain of pairs that strictly increases in both columns; `pairs` are distinct and sorted by column 0."""
    tails: list[int] = []  # smallest last value of a chain of every length
    last: list[int] = []  # the pair with that value
    previous = np.full(len(pairs), -1, np.int64)
    for number, value in enumerate(pairs[:, 1].tolist()):
        place = bisect_left(tails, value)
        previous[number] = last[place - 1] if place else -1
        tails[place : place + 1] = [value]
        last[place : place + 1] = [number]
    chain = []
    number = last[-1] if last else -1
    while number >= 0:
        chain.append(number)
        number = int(previous[number])
    return pairs[chain[::-1]]
