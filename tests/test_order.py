"""The order: a bijection, a pure function, every frame once; and the crops of labelled training."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.order import CropOrder, FixedCrops, cut_between_words, mix, permute, supervised_crops
from data.shards import DatasetWriter, Recording, open_dataset
from tests.made_datasets import FEATURES, noise

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


def test_every_place_of_a_permutation_is_equally_likely() -> None:
    counts = np.zeros((5, 5), int)
    for key in range(2000):
        counts[np.arange(5), permute(np.arange(5), 5, key)] += 1
    assert np.abs(counts - 400).max() < 100  # over five standard deviations


def test_one_place_is_found_without_the_others() -> None:
    many = permute(np.arange(10**6 - 50, 10**6), 3 * 10**9, 7)
    assert [int(permute(np.array([k]), 3 * 10**9, 7)[0]) for k in range(10**6 - 50, 10**6)] == many.tolist()


def test_hashes_are_the_same_on_every_machine() -> None:
    assert [int(mix(1, 2)), int(mix(-1))] == [int(mix(1, np.array([2]))[0]), int(mix(2**64 - 1))]
    assert permute(np.arange(8), 8, 1, 2).tolist() == [0, 6, 7, 1, 3, 5, 4, 2]


@settings(max_examples=60, deadline=None)
@given(max_frames=st.integers(20, 400), epoch=st.integers(0, 10**6), seed=st.integers(0, 2**63))
def test_every_frame_is_in_exactly_one_piece_of_an_epoch(max_frames: int, epoch: int, seed: int) -> None:
    order = CropOrder(LENGTHS, max_frames, 1, seed)
    crops = order.crops(epoch, np.arange(len(order)))
    seen = [np.zeros(n, int) for n in LENGTHS]
    for recording, start, stop in zip(crops.recording, crops.start, crops.stop, strict=True):
        assert 0 <= start <= stop <= LENGTHS[recording] and stop - start <= max_frames
        seen[recording][start:stop] += 1
    assert all((count == 1).all() for count in seen)


def test_recordings_up_to_the_limit_stay_whole_and_short_ones_are_left_out() -> None:
    order = CropOrder(np.array([99, 100, 300, 301]), 300, 100, 0, np.array([5, 6, 7, 8]))
    assert order.too_short == 1 and len(order) == 4
    crops = order.crops(0, np.arange(4))
    pieces = zip(crops.recording.tolist(), crops.start.tolist(), crops.stop.tolist(), strict=True)
    assert {piece for piece in pieces if piece[0] < 8} == {(6, 0, 100), (7, 0, 300)}


def test_long_recordings_are_cut_anew_every_epoch() -> None:
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
    with pytest.raises(DataError, match="50 frames that min_frames"):
        CropOrder(np.array([10, 20]), 100, 50, 0)


def test_fixed_crops_keep_their_text_in_every_order() -> None:
    table = FixedCrops([0, 0, 1], [0, 10, 5], [10, 30, 25], ["a", "b", "c"], seed=3)
    expected = {(0, 0, 10, "a"), (0, 10, 30, "b"), (1, 5, 25, "c")}
    for epoch in range(3):
        crops = table.crops(epoch, np.arange(3))
        columns = (crops.recording, crops.start, crops.stop, crops.item)
        assert {(int(r), int(a), int(b), table.text(i)) for r, a, b, i in zip(*columns, strict=True)} == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 80)), min_size=1, max_size=40), st.integers(30, 500))
def test_no_word_is_split_and_none_is_lost_uncounted(steps: list[tuple[int, int]], max_frames: int) -> None:
    words, now = [], 0
    for number, (gap, length) in enumerate(steps):
        words.append(Word(f"w{number}", (now + gap) / 100, (now + gap + length) / 100))
        now += gap + length
    pieces, skipped = cut_between_words(words, now + 40, max_frames, 100.0)
    spoken = [word for _, _, text in pieces for word in text.split()]
    assert len(spoken) + skipped == len(words) and sorted(set(spoken)) == sorted(spoken)
    times = {word: (start * 100, end * 100) for word, start, end, *_ in words}
    ends = 0
    for start, stop, text in pieces:
        assert ends <= start < stop <= now + 40 and stop - start <= max_frames
        ends = stop
        # Half a frame: cuts are whole frames, words need not be.
        assert all(start - 0.6 <= times[w][0] and times[w][1] <= stop + 0.6 for w in text.split())


def make_labelled(folder: Path, recordings: list[tuple[Recording, int]]):  # type: ignore[no-untyped-def]
    with DatasetWriter(folder, FEATURES) as writer:
        for recording, frames in recordings:
            writer.add(recording, noise(frames))
        writer.finish()
    dataset = open_dataset(folder)
    return dataset, dataset.select()


def test_labelled_recordings_are_whole_or_cut_between_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [("One,", 0.2, 1.0), ("two", 2.0, 3.0), ("three!", 3.2, 5.5)]
    dataset, indices = make_labelled(
        tmp_path,
        [
            (Recording("a", text="Short: Text."), 200),
            (Recording("b", text="One, two three!", words=words), 600),
            (Recording("c", text="no times"), 600),
            (Recording("d", text="?!"), 200),
            (Recording("e", text="tiny"), 20),
        ],
    )
    with caplog.at_level(logging.WARNING):
        table = supervised_crops(dataset, indices, 400, 50)
    crops = list(zip(table.recording.tolist(), table.start.tolist(), table.stop.tolist(), table.texts, strict=True))
    assert crops == [(0, 0, 200, "short text"), (1, 0, 310, "one two"), (1, 310, 600, "three")]
    assert "1 long recordings without word times" in caplog.text
    assert table.left_out == {
        "long recordings without word times": 1,
        "crops without a word": 1,
        "crops that are too short": 1,
    }


def test_recordings_without_a_transcript_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    recordings = [(Recording("a", text="yes"), 100), (Recording("b"), 100), (Recording("c"), 100)]
    dataset, indices = make_labelled(tmp_path, recordings)
    with pytest.raises(DataError, match="2 of 3 recordings have no transcript, the first is 'b'"):
        supervised_crops(dataset, indices, 400, 50)
