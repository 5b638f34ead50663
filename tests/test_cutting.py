"""The crops of labelled training."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards import DatasetWriter, Recording, open_dataset
from data.supervised import FixedCrops, cut_between_words, supervised_crops
from data.transcripts import Word
from tests.made_datasets import FEATURES, noise


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
