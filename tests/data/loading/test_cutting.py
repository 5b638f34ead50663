"""Cutting long recordings between their words: each policy against a slow reference; crops with labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import from_dict
from common.errors import UserError
from data.format.dataset import open_dataset
from data.format.writer import DatasetWriter
from data.loading.cutting import CUT, EXCLUDED, LONGER, CuttingSettings, RecordingCrops, cut_recording
from data.loading.supervised import FixedCrops, supervised_crops
from data.recording import Recording
from data.transcripts import Word
from tests.made_datasets import FEATURES, noise

RATE = 100.0
POLICIES = ("shift", "drop", "mask")


@st.composite
def recordings(draw: st.DrawFn, excluded: bool = True, guesses: bool = True) -> tuple[list[Word], int, list]:
    """Words w0, w1, ... (some overlapping, some without length, some guessed), frames, excluded stretches."""
    steps = draw(st.lists(st.tuples(st.integers(-20, 150), st.integers(0, 80), st.integers(0, 9)), max_size=40))
    words: list[Word] = []
    start = end = 0
    for number, (gap, length, sure) in enumerate(steps):
        start = max(start, end + gap)
        end = start + length
        words.append(Word(f"w{number}", start / 100, end / 100, 0.0 if guesses and sure == 0 else None))
    frames = max((round(word.end * 100) for word in words), default=0) + draw(st.integers(1, 300))
    edges = draw(st.lists(st.integers(0, frames), max_size=6)) if excluded else []
    stretches = [(min(pair) / 100, max(pair) / 100) for pair in zip(edges[::2], edges[1::2], strict=False)]
    return words, frames, stretches


def spans(words: Sequence[Word], frames: int) -> dict[str, tuple[int, int]]:
    """Frames in which each word may be: for a guessed word, anywhere between the neighbours with known times."""
    found = {}
    for i, word in enumerate(words):
        start, end = round(word.start * 100), round(word.end * 100)
        if word.confidence == 0:
            before = [round(w.end * 100) for w in words[:i] if w.confidence != 0]
            after = [round(w.start * 100) for w in words[i + 1 :] if w.confidence != 0]
            start, end = min([start, max(before, default=0)]), max([end, min(after, default=frames)])
        found[word.word] = start, end
    return found


def is_excluded(frame: int, excluded: Sequence[tuple[float, float]]) -> bool:
    return any(round(a * RATE) <= frame < round(b * RATE) for a, b in excluded)


@settings(max_examples=120, deadline=None)
@given(recordings(), st.integers(30, 500), st.sampled_from(POLICIES), st.integers(0, 300))
def test_every_word_is_in_one_crop_or_counted(recording: tuple, max_frames: int, policy: str, limit: int) -> None:
    words, frames, excluded = recording
    cut = cut_recording(words, frames, max_frames, RATE, CuttingSettings(policy, limit / 100), excluded)  # type: ignore[arg-type]
    spoken = [word for text in cut.texts for word in text.split()]
    assert spoken == sorted(set(spoken), key=lambda word: int(word[1:]))
    assert len(spoken) + cut.left_out.total() == len(words)
    assert all(count > 0 for count in cut.left_out.values()) and set(cut.left_out) <= {CUT, EXCLUDED, LONGER}


@settings(max_examples=120, deadline=None)
@given(recordings(), st.integers(30, 500), st.sampled_from(POLICIES), st.integers(0, 300))
def test_crops_contain_the_audio_of_exactly_their_words(
    recording: tuple, max_frames: int, policy: str, limit: int
) -> None:
    words, frames, excluded = recording
    cut = cut_recording(words, frames, max_frames, RATE, CuttingSettings(policy, limit / 100), excluded)  # type: ignore[arg-type]
    where = spans(words, frames)
    ended = 0
    for start, stop, text in zip(cut.start, cut.stop, cut.texts, strict=True):
        assert ended <= start < stop <= frames and stop - start <= max_frames
        assert not any(is_excluded(frame, excluded) for frame in range(start, stop))
        crop_words = set(text.split())
        assert all(start <= where[word][0] and where[word][1] <= stop for word in crop_words)
        if policy != "drop":  # with drop, the audio of dropped words stays
            assert not any(a < stop and b > start and a < b for word, (a, b) in where.items() if word not in crop_words)
        ended = stop


@settings(max_examples=120, deadline=None)
@given(recordings(guesses=False), st.integers(30, 500), st.sampled_from(POLICIES))
def test_frames_are_left_out_only_with_words_or_excluded_stretches(
    recording: tuple, max_frames: int, policy: str
) -> None:
    words, frames, excluded = recording
    cut = cut_recording(words, frames, max_frames, RATE, CuttingSettings(policy), excluded)  # type: ignore[arg-type]
    spoken = {word for text in cut.texts for word in text.split()}
    lost = [span for word, span in spans(words, frames).items() if word not in spoken and policy != "drop"]
    inside = np.zeros(frames, bool)
    for start, stop in zip(cut.start, cut.stop, strict=True):
        inside[start:stop] = True
    for frame in np.flatnonzero(~inside).tolist():
        assert is_excluded(frame, excluded) or any(a <= frame < b for a, b in lost)


def merged_words(words: Sequence[Word]) -> list[tuple[int, int, list[str]]]:
    """Merge overlapping words; times in frames."""
    units: list[tuple[int, int, list[str]]] = []
    for word in words:
        start, end = round(word.start * 100), round(word.end * 100)
        if units and start < units[-1][1]:
            units[-1] = (units[-1][0], max(units[-1][1], end), [*units[-1][2], word.word])
        else:
            units.append((start, end, [word.word]))
    return units


def shift_slowly(words: Sequence[Word], frames: int, max_frames: int, limit: int) -> list[tuple[int, int, str]]:
    """Reference for `shift`, which tries every frame; for words with known times and without excluded stretches."""
    units = merged_words(words)
    edges = [0, *(end for _, end, _ in units)]
    crops, start, next_unit = [], 0, 0  # units before `next_unit` are in a crop or lost
    while frames - start > max_frames:
        nominal = start + max_frames
        behind = [i for i in range(next_unit, len(units)) if units[i][1] > nominal]
        cut = None
        for shortest in (10, 0) if behind else ():  # a pause, else any place between two words
            for place in range(nominal, max(start, nominal - limit - 1), -1):
                for i in range(behind[0], next_unit - 1, -1):
                    unit_start, gap = units[i][0], units[i][0] - edges[i]
                    if cut is None and gap >= shortest and edges[i] <= place <= unit_start - min(gap // 2, 50):
                        cut = place, i
        if cut is not None:
            after, resume = cut[1], cut[0]
        elif behind and units[behind[0]][0] < nominal:
            after, resume = behind[0] + 1, units[behind[0]][1]
            cut = units[behind[0]][0], behind[0]
        else:
            after, resume = (behind[0] if behind else len(units)), nominal
            cut = nominal, after
        crops.append((start, cut[0], " ".join(w for unit in units[next_unit : cut[1]] for w in unit[2])))
        start, next_unit = resume, after
    crops.append((start, frames, " ".join(w for unit in units[next_unit:] for w in unit[2])))
    return [crop for crop in crops if crop[0] < crop[1]]


def as_list(cut: RecordingCrops) -> list[tuple[int, int, str]]:
    return list(zip(cut.start, cut.stop, cut.texts, strict=True))


@settings(max_examples=120, deadline=None)
@given(recordings(excluded=False, guesses=False), st.integers(30, 500), st.integers(0, 300))
def test_shift_equals_a_search_frame_by_frame(recording: tuple, max_frames: int, limit: int) -> None:
    words, frames, _ = recording
    cut = cut_recording(words, frames, max_frames, RATE, CuttingSettings("shift", limit / 100))
    assert as_list(cut) == shift_slowly(words, frames, max_frames, limit)


@settings(max_examples=80, deadline=None)
@given(recordings(excluded=False, guesses=False), st.integers(30, 500))
def test_drop_removes_words_at_nominal_cuts_but_no_audio(recording: tuple, max_frames: int) -> None:
    words, frames, _ = recording
    cut = cut_recording(words, frames, max_frames, RATE, CuttingSettings("drop"))
    places = [*range(0, frames, max_frames), frames]
    assert list(zip(cut.start, cut.stop, strict=True)) == list(zip(places[:-1], places[1:], strict=True))
    spoken = {word for text in cut.texts for word in text.split()}
    for word, (start, end) in spans(words, frames).items():
        assert (word in spoken) == (not any(start < place < end for place in places))


@settings(max_examples=80, deadline=None)
@given(recordings(excluded=False, guesses=False), st.integers(30, 500))
def test_mask_removes_words_at_nominal_cuts_with_their_audio(recording: tuple, max_frames: int) -> None:
    words, frames, _ = recording
    cut = cut_recording(words, frames, max_frames, RATE, CuttingSettings("mask"))
    places = range(max_frames, frames, max_frames)
    inside = np.ones(frames, bool)
    for start, end, _ in merged_words(words):
        if any(start < place < end for place in places):
            inside[start:end] = False
    expected = np.zeros(frames, bool)
    for start, stop in zip(cut.start, cut.stop, strict=True):
        expected[start:stop] = True
        assert not any(start < place < stop for place in places)
    assert np.array_equal(inside, expected)


SPEECH = [Word("a", 0.2, 1.0), Word("b", 1.5, 3.0), Word("c", 3.05, 4.5), Word("d", 4.9, 5.5)]


@pytest.mark.parametrize(
    ("policy", "crops", "left_out"),
    [
        ("shift", [(0, 125, "a"), (125, 470, "b c"), (470, 600, "d")], {}),
        ("drop", [(0, 400, "a b"), (400, 600, "d")], {CUT: 1}),
        ("mask", [(0, 305, "a b"), (450, 600, "d")], {CUT: 1}),
    ],
)
def test_each_policy_matches_its_help_text(policy: str, crops: list, left_out: dict) -> None:
    cut = cut_recording(SPEECH, 600, 400, RATE, CuttingSettings(policy, 3.0))  # type: ignore[arg-type]
    assert as_list(cut) == crops and cut.left_out == left_out


def test_shift_beyond_its_limit_equals_mask() -> None:
    for limit, crops in [
        (2.75, [(0, 125, "a"), (125, 470, "b c"), (470, 600, "d")]),  # to the pause after a
        (2.0, [(0, 303, "a b"), (303, 600, "c d")]),  # no pause within reach: between two words
        (0.5, [(0, 305, "a b"), (450, 600, "d")]),  # nothing within reach
    ]:
        cut = cut_recording(SPEECH, 600, 400, RATE, CuttingSettings("shift", limit))
        assert as_list(cut) == crops


def test_no_cut_depends_on_a_guessed_time() -> None:
    guessed = [Word("a", 0.2, 1.0), Word("b", 1.5, 3.0), Word("c", 3.5, 3.6, 0.0), Word("d", 4.9, 5.5)]
    cut = cut_recording(guessed, 600, 400, RATE, CuttingSettings("shift", 2.0))
    assert as_list(cut) == [(0, 300, "a b"), (490, 600, "d")] and cut.left_out == {CUT: 1}  # c is in 3.0 to 4.9 s
    cut = cut_recording(guessed, 600, 400, RATE, CuttingSettings("shift", 3.0))
    # No cut is allowed in the gap before d either, because c may be in it: d is removed.
    assert as_list(cut) == [(0, 125, "a"), (125, 490, "b c"), (550, 600, "")] and cut.left_out == {CUT: 1}
    cut = cut_recording([Word("x", 1, 2, 0.0), Word("y", 3, 4, 0.0)], 900, 400, RATE)
    assert cut.texts == [] and cut.left_out == {LONGER: 2}  # no time is known: no cut is allowed


def test_a_word_partly_in_an_excluded_stretch_is_removed_with_its_audio() -> None:
    excluded = [(0.9, 1.2), (3.2, 3.3)]
    masked = cut_recording(SPEECH, 600, 400, RATE, CuttingSettings("shift"), excluded)
    assert as_list(masked) == [(0, 20, ""), (120, 305, "b"), (450, 600, "d")] and masked.left_out == {EXCLUDED: 2}
    dropped = cut_recording(SPEECH, 600, 400, RATE, CuttingSettings("drop"), excluded)
    assert as_list(dropped) == [(0, 90, ""), (120, 320, "b"), (330, 600, "d")]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_word_of_zero_length_next_to_an_excluded_stretch_is_counted(policy: str) -> None:
    words = [Word("a", 0.0, 0.0, 0.0), Word("b", 0.0, 0.02)]
    cut = cut_recording(words, 3, 30, RATE, CuttingSettings(policy), [(0.0, 0.02)])  # type: ignore[arg-type]
    assert as_list(cut) == [(2, 3, "")] and cut.left_out == {EXCLUDED: 2}


@pytest.mark.parametrize(
    ("policy", "crops", "cut_words"), [("shift", [(60, 100, "c")], 1), ("mask", [(60, 70, ""), (90, 100, "")], 2)]
)
def test_a_word_of_zero_length_before_a_masked_word_is_counted(policy: str, crops: list, cut_words: int) -> None:
    words = [Word("a", 0.0, 0.0), Word("b", 0.0, 0.6), Word("c", 0.7, 0.9)]
    cut = cut_recording(words, 100, 40, RATE, CuttingSettings(policy))  # type: ignore[arg-type]
    assert as_list(cut) == crops and cut.left_out == {CUT: cut_words, LONGER: 1}


@pytest.mark.parametrize("stretch", [(2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_invalid_excluded_stretches_are_refused(stretch: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"excluded stretch .* is required"):
        cut_recording(SPEECH, 600, 400, RATE, excluded=[stretch])


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(UserError, match="straddling is 'skip', expected one of shift, drop, mask"):
        from_dict(CuttingSettings, {"straddling": "skip"})
    with pytest.raises(UserError, match="cutting.shift_seconds is -1"):
        CuttingSettings(shift_seconds=-1)


def test_fixed_crops_keep_their_text_in_every_order() -> None:
    table = FixedCrops([0, 0, 1], [0, 10, 5], [10, 30, 25], ["a", "b", "c"], seed=3)
    expected = {(0, 0, 10, "a"), (0, 10, 30, "b"), (1, 5, 25, "c")}
    for epoch in range(3):
        crops = table.crops(epoch, np.arange(3))
        columns = (crops.recording, crops.start, crops.stop, crops.item)
        assert {(int(r), int(a), int(b), table.text(i)) for r, a, b, i in zip(*columns, strict=True)} == expected


def make_labelled(folder: Path, recordings: list[tuple[Recording, int]]):
    with DatasetWriter(folder, FEATURES) as writer:
        for recording, frames in recordings:
            writer.add(recording, noise(frames))
        writer.finish()
    dataset = open_dataset(folder)
    return dataset, dataset.select()


def table_of(crops: FixedCrops) -> list[tuple[int, int, int, str]]:
    return list(zip(crops.recording.tolist(), crops.start.tolist(), crops.stop.tolist(), crops.texts, strict=True))


WORDS = [Word("One,", 0.2, 1.0), Word("two", 2.0, 3.0), Word("three!", 3.2, 5.5)]


def test_labelled_recordings_are_whole_or_cut_between_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset, indices = make_labelled(
        tmp_path,
        [
            (Recording("a", text="Short: Text."), 200),
            (Recording("b", text="One, two three!", words=WORDS), 600),
            (Recording("c", text="no times"), 600),
            (Recording("d", text="?!"), 200),
            (Recording("e", text="tiny"), 20),
        ],
    )
    with caplog.at_level(logging.WARNING):
        table = supervised_crops(dataset, indices, 400, 50)
    assert table_of(table) == [(0, 0, 200, "short text"), (1, 0, 310, "one two"), (1, 310, 600, "three")]
    assert "1 long recordings without word times" in caplog.text and "do not make up" not in caplog.text
    assert table.left_out == {
        "long recordings without word times": 1,
        "crops without a word": 1,
        "crops that are too short": 1,
    }
    masked = supervised_crops(dataset, indices, 400, 50, cutting=CuttingSettings("mask"))
    assert table_of(masked)[1:] == [(1, 0, 320, "one two")] and masked.left_out[CUT] == 1


def test_excluded_stretches_are_in_no_crop_even_of_short_recordings(tmp_path: Path) -> None:
    dataset, indices = make_labelled(
        tmp_path,
        [
            (Recording("a", text="one two three", words=WORDS, excluded=[(1.9, 3.1)]), 600),
            (Recording("b", text="no times", excluded=[(1.0, 2.0)]), 600),
        ],
    )
    table = supervised_crops(dataset, indices, 1000, 50)
    assert table_of(table) == [(0, 0, 190, "one"), (0, 310, 600, "three")]
    assert table.left_out == {EXCLUDED: 1, "recordings with excluded stretches without word times": 1}


def test_labels_of_crops_together_are_the_label_of_the_whole_text(tmp_path: Path) -> None:
    said = ["pay", "$3", "million", "[background", "noise]", "now"]
    words = [Word(word, 2.0 * number + 0.2, 2.0 * number + 1.8) for number, word in enumerate(said)]
    dataset, indices = make_labelled(
        tmp_path, [(Recording("a", text=" ".join(said), words=words, language="en"), 1200)]
    )
    for max_frames in (200, 400, 600, 800):
        table = supervised_crops(dataset, indices, max_frames, 50)
        assert " ".join(table.texts) == "pay 3 million dollars now"


def test_words_that_differ_from_the_transcript_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shuffled = [Word(WORDS[i].word, *time[1:]) for i, time in zip((2, 0, 1), WORDS, strict=True)]
    dataset, indices = make_labelled(
        tmp_path,
        [
            (Recording("a", text="one two THREE", words=WORDS), 600),
            (Recording("b", text="one two three", words=shuffled), 600),
            (Recording("c", text="four", words=shuffled), 300),  # used whole: its transcript is its label
        ],
    )
    with caplog.at_level(logging.WARNING):
        table = supervised_crops(dataset, indices, 400, 50)
    assert "words of 1 long recordings differ from their transcripts, the first is 'b'" in caplog.text
    assert table_of(table)[-1] == (2, 0, 300, "four")


def test_recordings_without_a_transcript_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    recordings = [(Recording("a", text="yes"), 100), (Recording("b"), 100), (Recording("c"), 100)]
    dataset, indices = make_labelled(tmp_path, recordings)
    with pytest.raises(UserError, match="2 of 3 recordings have no transcript, the first is 'b'"):
        supervised_crops(dataset, indices, 400, 50)
