"""Joining transcripts of overlapping windows: no duplicates, no losses, ordered times."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from bestrq.decoding.tokens import TimedTokens
from bestrq.long_form.decoders import decode_recordings
from bestrq.long_form.inference import InferenceSettings, RecordingSource
from bestrq.long_form.stitching import align_tokens, join, shift, stitch_recordings
from common.errors import UserError
from tests.long_form.test_decoders import KINDS, RATE, STRIDE, make_decoder, source

FRAMES_PER_SECOND = 25.0


def timed(ids: list[int], frames: list[int]) -> TimedTokens:
    return TimedTokens(ids, frames, [frame + 1 for frame in frames])


def speech(seed: int, num_frames: int, labels: int = 6, gap: int = 5) -> TimedTokens:
    """Random tokens of a small alphabet, so that many repeat, at least `gap` frames apart."""
    generator, frames, frame = random.Random(seed), [], 3
    while frame < num_frames:
        frames.append(frame)
        frame += generator.randint(gap, 4 * gap)
    return timed([generator.randint(1, labels) for _ in frames], frames)


def window_tokens(truth: TimedTokens, start: int, stop: int, seed: int, jitter: int, edge: int) -> TimedTokens:
    """Simulated tokens of a window: within `edge` frames of its ends, tokens are lost or wrong; times have jitter."""
    generator = random.Random(seed)
    ids, frames = [], []
    for label, frame in zip(truth.ids, truth.first_frame, strict=True):
        if not start <= frame < stop:
            continue
        if min(frame - start, stop - frame) < edge:
            if generator.random() < 0.5:
                continue
            label = generator.randint(1, 6)
        ids.append(label)
        shifted = frame + generator.randint(-jitter, jitter)
        frames.append(max(start, min(stop - 1, shifted), frames[-1] if frames else 0))
    return timed(ids, frames)


def joined(truth: TimedTokens, num_frames: int, size: int, hop: int, **errors: int) -> TimedTokens:
    tokens, end, start = TimedTokens([], [], []), 0, 0
    while True:
        stop = min(start + size, num_frames)
        is_first = start == 0
        # The ends of the recording are not edges: no word is cut there.
        window = window_tokens(
            truth, start if not is_first else -100, stop if stop < num_frames else num_frames + 100, start, **errors
        )
        tokens, end = join(tokens, window, start, end, FRAMES_PER_SECOND), stop
        if stop == num_frames:
            return tokens
        start = min(start + hop, max(num_frames - size, start + 1))


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    num_frames=st.integers(1, 1500),
    hop=st.integers(60, 150),
    jitter=st.integers(0, 2),
    edge=st.integers(0, 20),
)
def test_no_token_is_lost_or_doubled_if_windows_agree_in_the_middle(
    seed: int, num_frames: int, hop: int, jitter: int, edge: int
) -> None:
    truth = speech(seed, num_frames)
    result = joined(truth, num_frames, 240, hop, jitter=jitter, edge=edge)
    assert result.ids == truth.ids
    assert result.first_frame == sorted(result.first_frame)
    assert all(abs(a - b) <= jitter for a, b in zip(result.first_frame, truth.first_frame, strict=True))
    assert all(first <= last for first, last in zip(result.first_frame, result.last_frame, strict=True))


def test_the_join_is_at_the_agreed_token_nearest_to_the_middle() -> None:
    """Both have 1 2 3 in the overlap 100 to 200; the other labels show which window a token is from."""
    before = timed([7, 1, 8, 2, 8, 3, 8], [90, 110, 120, 140, 160, 180, 190])
    after = timed([9, 1, 9, 2, 9, 3, 9, 7], [105, 112, 125, 143, 161, 182, 191, 210])
    result = join(before, after, 100, 200, FRAMES_PER_SECOND)
    assert result.ids == [7, 1, 8, 2, 9, 3, 9, 7]
    assert result.first_frame == [90, 110, 120, 140, 161, 182, 191, 210]
    assert result.last_frame == [91, 111, 121, 141, 162, 183, 192, 211]


def test_without_agreement_the_join_is_in_the_middle() -> None:
    before, after = timed([1, 2, 3], [110, 149, 150]), timed([4, 5, 6], [110, 149, 150])
    assert join(before, after, 100, 200, FRAMES_PER_SECOND).ids == [1, 2, 6]


def test_a_repeated_word_is_not_merged() -> None:
    """Each window has lost one of the two: their times differ."""
    before, after = timed([5, 1], [40, 130]), timed([1, 6], [170, 260])
    assert join(before, after, 100, 200, FRAMES_PER_SECOND) == timed([5, 1, 1, 6], [40, 130, 170, 260])


def test_windows_without_overlap_are_concatenated() -> None:
    before, after = timed([1, 2], [10, 99]), timed([2, 3], [100, 120])
    assert join(before, after, 100, 100, FRAMES_PER_SECOND) == timed([1, 2, 2, 3], [10, 99, 100, 120])


def test_a_window_of_silence_replaces_only_its_part() -> None:
    before, silence = timed([1, 2, 3], [10, 120, 180]), TimedTokens([], [], [])
    assert join(before, silence, 100, 200, FRAMES_PER_SECOND).ids == [1, 2]
    assert join(silence, before, 0, 0, FRAMES_PER_SECOND) == before
    assert join(silence, silence, 100, 200, FRAMES_PER_SECOND) == silence


def test_times_do_not_decrease_if_two_windows_differ_on_a_time() -> None:
    before, after = timed([1, 2], [145, 155]), timed([2, 3], [147, 150])
    result = join(before, after, 100, 200, FRAMES_PER_SECOND)
    assert result.ids == [1, 2, 3] and result.first_frame == [145, 155, 155] and result.last_frame == [146, 156, 155]


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    first=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30)), max_size=6),
    second=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30)), max_size=6),
)
def test_the_alignment_is_the_best_of_all(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    """Compared with an exhaustive search."""
    sides = [timed([label for label, _ in side], sorted(frame for _, frame in side)) for side in (first, second)]

    def weight(i: int, j: int) -> float:
        same = sides[0].ids[i] == sides[1].ids[j]
        return max(0.0, 1 - abs(sides[0].first_frame[i] - sides[1].first_frame[j]) / 10) if same else 0.0

    def best(i: int, j: int) -> float:
        if i == len(first) or j == len(second):
            return 0.0
        return max(best(i + 1, j), best(i, j + 1), best(i + 1, j + 1) + weight(i, j))

    pairs = align_tokens(*sides, tolerance=10)
    assert sum(weight(i, j) for i, j in pairs) == pytest.approx(best(0, 0))
    assert all(weight(i, j) > 0 for i, j in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in zip(pairs, pairs[1:], strict=False))


def test_shift_changes_only_times() -> None:
    assert shift(timed([4, 5], [1, 7]), 100) == timed([4, 5], [101, 107])


def stitched(kind: str, sources: list[RecordingSource], context: float, batch: float = 1e6) -> list[TimedTokens]:
    settings = InferenceSettings("stitched", context, 0.5, batch)
    result = dict(decode_recordings(make_decoder(kind), sources, settings, STRIDE, RATE))
    return [result[index] for index in range(len(sources))]


@pytest.mark.parametrize("kind", KINDS)
def test_recordings_are_stitched_the_same_in_any_batch_and_whole_in_one_window(kind: str) -> None:
    sources = [source(n, *([(0.5, 1.0)] if n == 203 else [])) for n in (1, 30, 203, 200)]
    together = stitched(kind, sources, 0.8)
    assert stitched(kind, sources, 0.8, batch=0.01) == together == stitched(kind, sources, 0.8, batch=2.0)
    assert [t for t in together[2].first_frame if 0.5 <= 0.04 * t + 0.02 < 1.0] == []
    assert all(tokens.first_frame == sorted(tokens.first_frame) for tokens in together)
    settings = InferenceSettings("whole")
    whole = dict(decode_recordings(make_decoder(kind), sources, settings, STRIDE, RATE))
    assert stitched(kind, sources, 3.0) == [whole[index] for index in range(4)]


def test_windows_with_correct_tokens_give_the_correct_transcript() -> None:
    """Model without context: the label of a frame is its input."""
    truth = speech(3, 1000)
    labels = torch.zeros(1000, 1)
    labels[truth.first_frame, 0] = torch.tensor(truth.ids, dtype=torch.float32)

    def search(kept: object, excluded: object) -> list[TimedTokens]:
        assert isinstance(kept, list)
        result = []
        for outputs in kept:
            [frames] = outputs[:, 0].nonzero(as_tuple=True)
            result.append(TimedTokens(outputs[frames, 0].int().tolist(), frames.tolist(), frames.tolist()))
        return result

    silent = RecordingSource(300, lambda start, stop: torch.zeros(stop - start, 1))
    spoken = RecordingSource(1000, lambda start, stop: labels[start:stop])
    settings = InferenceSettings("stitched", 100.0, 0.25, 250.0)
    result = dict(
        stitch_recordings(lambda rows, *_: rows, lambda x: x, search, [silent, spoken, silent], settings, 1, 1.0)
    )
    assert result[0].ids == result[2].ids == [] and result[1].ids == truth.ids
    assert result[1].first_frame == truth.first_frame


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_frames_of_a_transducer_are_not_averaged(kind: str) -> None:
    settings = InferenceSettings("averaged", 0.8, 0.5)
    with pytest.raises(UserError, match="inference.mode = 'averaged' .* choose 'buffered' or 'stitched'"):
        list(decode_recordings(make_decoder(kind), [source(200)], settings, STRIDE, RATE))
