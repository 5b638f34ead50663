"""Order of crops: a bijection and a pure function that covers every frame once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.hashing import mix
from data.loading.order import CropOrder, permute

LENGTHS = np.random.default_rng(0).integers(20, 900, 200)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 100, 255, 256, 257, 1000, 4097])
def test_the_permutation_is_a_bijection(size: int) -> None:
    for key in range(3):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key, 1)), np.arange(size))


def test_the_permutation_differs_by_key_and_mixes() -> None:
    a, b = permute(np.arange(1000), 1000, 0, 1), permute(np.arange(1000), 1000, 0, 2)
    assert (a == b).sum() < 20 and (a == np.arange(1000)).sum() < 20
    # Neighbours end up far apart: their distance has the mean of independent draws, size / 3.
    assert abs(np.abs(np.diff(a)).mean() / 333 - 1) < 0.1


def test_every_image_of_a_permutation_is_equally_probable() -> None:
    counts = np.zeros((5, 5), int)
    for key in range(2000):
        counts[np.arange(5), permute(np.arange(5), 5, key)] += 1
    assert np.abs(counts - 400).max() < 100  # over five standard deviations


def test_single_elements_are_permuted_independently() -> None:
    many = permute(np.arange(10**6 - 50, 10**6), 3 * 10**9, 7)
    assert [int(permute(np.array([k]), 3 * 10**9, 7)[0]) for k in range(10**6 - 50, 10**6)] == many.tolist()


def test_hashes_are_the_same_on_every_machine() -> None:
    assert [int(mix(1, 2)), int(mix(-1))] == [int(mix(1, np.array([2]))[0]), int(mix(2**64 - 1))]
    assert permute(np.arange(8), 8, 1, 2).tolist() == [0, 6, 7, 1, 3, 5, 4, 2]


@settings(max_examples=60, deadline=None)
@given(max_frames=st.integers(20, 400), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**63))
def test_every_frame_is_in_exactly_one_crop_of_an_epoch(max_frames: int, epoch: int, seed: int) -> None:
    order = CropOrder(LENGTHS, max_frames, 1, seed)
    crops = order.crops(epoch, np.arange(len(order)))
    seen = [np.zeros(n, int) for n in LENGTHS]
    for recording, start, stop in zip(crops.recording, crops.start, crops.stop, strict=True):
        assert 0 <= start <= stop <= LENGTHS[recording] and stop - start <= max_frames
        seen[recording][start:stop] += 1
    assert all((count == 1).all() for count in seen)


def test_recordings_up_to_the_limit_are_single_crops_and_short_ones_are_left_out() -> None:
    frames = np.array([500] * 5 + [99, 100, 300, 301])
    order = CropOrder(frames, 300, 100, 0, np.array([5, 6, 7, 8]))
    assert order.too_short == 1 and len(order) == 4
    crops = order.crops(0, np.arange(4))
    pieces = zip(crops.recording.tolist(), crops.start.tolist(), crops.stop.tolist(), strict=True)
    assert {piece for piece in pieces if piece[0] < 8} == {(6, 0, 100), (7, 0, 300)}


def test_long_recordings_are_cut_differently_in_every_epoch() -> None:
    order = CropOrder(np.array([1000]), 300, 10, 0)
    cuts = {tuple(np.sort(order.crops(epoch, np.arange(4)).start).tolist()) for epoch in range(20)}
    assert len(cuts) > 15


def test_a_crop_is_a_pure_function_of_seed_epoch_and_number() -> None:
    first, second = CropOrder(LENGTHS, 200, 20, 1), CropOrder(LENGTHS, 200, 20, 1)
    everything = first.crops(3, np.arange(len(first)))
    for k in (0, 17, len(first) - 1):
        fields = (everything.recording[k], everything.start[k], everything.stop[k], everything.seed[k])
        assert second.crop(3, k) == tuple(map(int, fields))
    orders = [CropOrder(LENGTHS, 200, 20, seed) for seed in (1, 2)]
    seeds = np.concatenate([order.crops(epoch, np.arange(300)).seed for order in orders for epoch in (0, 1)])
    assert len(np.unique(seeds)) == 1200 and seeds.min() >= 0


def test_an_order_without_a_long_enough_recording_is_refused() -> None:
    with pytest.raises(UserError, match="min_frames = "):
        CropOrder(np.array([10, 20]), 100, 50, 0)
