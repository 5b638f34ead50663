"""Places where a long transcript and what a recogniser heard agree, found in little memory: `match_labels`.

The way of patience diff: stretches of labels that occur once in the one sequence and once in the other are paired, of
the pairs the longest chain that rises in both is kept, and between two links of the chain the same is done again,
where more stretches are unique and, since less can agree by chance, shorter ones will do.

U labels of the transcript, H labels heard. Time O((U + H) log (U + H)) a level, memory O(U + H).
"""

import math
from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]

MAX_LEVELS = 12
# Language repeats itself more than labels drawn one by one: stretches are this much longer than chance would ask.
_LONGER_THAN_CHANCE = 1.5
_CHANCE = 0.01


def match_labels(text: Labels, heard: Labels) -> Labels:
    """For every label of the transcript, the place of the label heard that it is matched with, or -1; int64 `[U]`.

    Matched places rise strictly. A negative label in the transcript matches nothing, for none is heard.
    """
    matched = np.full(len(text), -1, np.int64)
    regions = [(0, len(text), 0, len(heard), 0)]
    while regions:
        begin, end, heard_begin, heard_end, level = regions.pop()
        part, heard_part = text[begin:end], heard[heard_begin:heard_end]
        length = stretch_length(part, heard_part)
        if level == MAX_LEVELS or min(len(part), len(heard_part)) < length:
            continue
        pairs = _rising(_unique_pairs(part, heard_part, length))
        if not len(pairs):
            continue
        # A stretch is `length` matched labels; where two stretches contradict each other, the first one stands.
        places = (pairs[:, :1] + np.arange(length)).ravel() + begin
        partners = (pairs[:, 1:] + np.arange(length)).ravel() + heard_begin
        before = np.maximum.accumulate(np.concatenate([[begin - 1], places]))[:-1]
        heard_before = np.maximum.accumulate(np.concatenate([[heard_begin - 1], partners]))[:-1]
        kept = (places > before) & (partners > heard_before)
        places, partners = places[kept], partners[kept]
        matched[places] = partners
        edges = zip(
            np.concatenate([[begin], places + 1]).tolist(),
            np.concatenate([places, [end]]).tolist(),
            np.concatenate([[heard_begin], partners + 1]).tolist(),
            np.concatenate([partners, [heard_end]]).tolist(),
            strict=True,
        )
        regions += [(*edge, level + 1) for edge in edges if edge[0] < edge[1] and edge[2] < edge[3]]
    return matched


def stretch_length(text: Labels, heard: Labels) -> int:
    """Labels that a stretch must have, so that two sequences of these lengths hardly share one by chance."""
    if not len(text) or not len(heard):
        return 1
    _, counts = np.unique(text, return_counts=True)
    alike = min(float(np.square(counts / len(text)).sum()), 0.5)  # chance that two labels drawn at random are equal
    return max(3, math.ceil(_LONGER_THAN_CHANCE * math.log(len(text) * len(heard) / _CHANCE) / -math.log(alike)))


def _unique_pairs(text: Labels, heard: Labels, length: int) -> Labels:
    """Places `[n, 2]`, by the place in the text, of the stretches that occur once in both."""
    keys, places = _unique_stretches(text, length)
    heard_keys, heard_places = _unique_stretches(heard, length)
    _, first, second = np.intersect1d(keys, heard_keys, assume_unique=True, return_indices=True)
    pairs = np.stack([places[first], heard_places[second]], axis=1)
    pairs = pairs[np.argsort(pairs[:, 0])]
    # Keys are hashes: what is equal by hash alone is thrown out.
    offsets = np.arange(length)
    return pairs[(text[pairs[:, :1] + offsets] == heard[pairs[:, 1:] + offsets]).all(axis=1)]


def _unique_stretches(labels: Labels, length: int) -> tuple[NDArray[np.uint64], Labels]:
    """Hash and place of every stretch that occurs once."""
    weights = np.random.default_rng(0).integers(0, 2**63, length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    count = len(labels) - length + 1
    keys = np.zeros(count, np.uint64)
    for offset, weight in enumerate(weights):  # one label of all stretches at a time: memory O(n), not O(n * length)
        keys += labels[offset : offset + count].astype(np.uint64) * weight
    keys, places, counts = np.unique(keys, return_index=True, return_counts=True)
    return keys[counts == 1], places[counts == 1]


def _rising(pairs: Labels) -> Labels:
    """The longest chain of pairs that rises strictly in both columns; `pairs` is sorted by the first, all distinct."""
    tails: list[int] = []  # smallest last value of a chain of every length
    last: list[int] = []  # the pair that has it
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
