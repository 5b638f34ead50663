"""Pseudo-random hashes: SplitMix64 for crop order, SpecAugment and CPU dropout; a hash of texts for splits.

Source of SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar

import numpy as np

# 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers: torch has no arithmetic on uint64.
INCREMENT = -0x61C8864680B583EB
_MULTIPLIERS = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15

Bits = TypeVar("Bits", bound=Any)


def splitmix64(bits: Bits) -> Bits:
    """Apply the finaliser of SplitMix64 in place to an int64 array or tensor of any shape, and return it."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        bits ^= _shifted(bits, shift)
        bits *= multiplier
    bits ^= _shifted(bits, 31)
    return bits


def _shifted(bits: Bits, shift: int) -> Bits:
    """Logical right shift; `>>` alone extends the sign."""
    shifted = bits >> shift
    shifted &= (1 << (64 - shift)) - 1
    return shifted


def mix(*numbers: int | np.ndarray) -> np.ndarray:
    """Hash integers (each taken modulo 2**64) or arrays of them, which are broadcast, to uint64."""
    state = np.zeros(1, np.int64)
    for number in numbers:
        word = np.uint64(number % (1 << 64)) if isinstance(number, int) else number.astype(np.uint64)
        state = splitmix64(state + (np.asarray(word).view(np.int64) + np.int64(INCREMENT)))
    shape = np.broadcast_shapes(*(np.shape(number) for number in numbers))
    return state.reshape(shape).view(np.uint64)


def hash_share(key: str) -> float:
    """Pseudo-random number in [0, 1) from a text: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
