"""Word times: pieces against a single pass, bounded memory, refused transcripts."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bestrq.alignment import alignment as module
from bestrq.alignment.alignment import (
    Alignment,
    AlignmentSettings,
    LogProbSpool,
    forced_alignment,
    refusal,
    word_times,
)
from bestrq.alignment.anchors import match_labels
from bestrq.alignment.pieces import STAR, Transcript, plan_pieces
from bestrq.long_form.inference import InferenceSettings, RecordingSource, model_outputs
from common.errors import UserError
from tests.long_form.test_inference import STRIDE, LocalModel, recording

VOCABULARY, SPACE = 20, 19
ONE_PIECE = AlignmentSettings(piece_cells=10**9, max_cells=10**9)
SMALL_PIECES = AlignmentSettings(piece_cells=20_000)


def random_words(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Words of 1 to 7 random letters from 1 to SPACE - 1."""
    return [rng.integers(1, SPACE, size=rng.integers(1, 8)).tolist() for _ in range(count)]


class MadeAudio:
    """Log-probabilities like those of a recogniser: one spike per label, blanks between, mistakes, uneven tempo."""

    def __init__(self, rng: np.random.Generator, mistakes: float = 0.08) -> None:
        self.rng, self.mistakes = rng, mistakes
        self.labels: list[int] = []
        self.pauses(5)

    def pauses(self, frames: int) -> None:
        self.labels += [0] * frames

    def say(self, words: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """Append words; return (frame of the first label, frame after that of the last) of each."""
        spans = []
        for word in words:
            start = len(self.labels)
            for label in word:
                last = len(self.labels) + int(self.rng.integers(1, 3))
                self.labels += [label] * (last - len(self.labels))
                self.pauses(int(self.rng.integers(1, 3)))
            spans.append((start, last))
            self.labels.append(SPACE)
            self.pauses(int(self.rng.integers(0, 4)))
        return spans

    def log_probs(self) -> NDArray[np.float32]:
        """float32 `[T, V]`; a share of the labels has another most probable label, but keeps a high probability."""
        rng = self.rng
        self.pauses(5)
        labels = np.array(self.labels)
        logits = rng.normal(0, 1, (len(labels), VOCABULARY))
        logits[np.arange(len(labels)), labels] += 9
        wrong = np.flatnonzero((rng.random(len(labels)) < self.mistakes) & (labels > 0))
        logits[wrong, labels[wrong]] -= 4
        logits[wrong, rng.integers(0, VOCABULARY, len(wrong))] += 9
        return torch.log_softmax(torch.from_numpy(logits), dim=-1).float().numpy()


def align(
    log_probs: NDArray[np.float32], words: Sequence[Sequence[int]], limits: AlignmentSettings = ONE_PIECE
) -> tuple[Alignment, str | None]:
    transcript = Transcript.from_words(words, [SPACE])
    best = log_probs.argmax(axis=1)
    alignment = forced_alignment(
        lambda start, stop: log_probs[start:stop], best, transcript, log_probs.shape[1], limits
    )
    return alignment, refusal(alignment, transcript, len(best), limits)


def share_correct(alignment: Alignment, truth: Sequence[int] | NDArray[np.int64]) -> float:
    """Share of words that start within two frames of the truth: a mistake may replace a label's first frame."""
    return float((np.abs(alignment.start - truth) <= 2).mean())


def viterbi(log_probs: NDArray[np.float64], ids: Sequence[int]) -> tuple[float, list[int]]:
    """Most probable path through the CTC lattice, in plain loops: its log-probability and the label of every frame."""
    states = [0, *itertools.chain.from_iterable((label, 0) for label in ids)]
    score = np.full(len(states), -np.inf)
    score[:2] = [log_probs[0, state] for state in states[:2]]
    back: list[list[int]] = []
    for frame in log_probs[1:]:
        sources = []
        new = np.full(len(states), -np.inf)
        for s, label in enumerate(states):
            steps = [s, s - 1, s - 2] if label != 0 and s >= 2 and states[s - 2] != label else [s, s - 1]
            source = max((step for step in steps if step >= 0), key=lambda step: score[step])
            new[s] = score[source] + frame[label]
            sources.append(source)
        score = new
        back.append(sources)
    state = max(range(max(0, len(states) - 2), len(states)), key=lambda s: score[s])
    best, path = float(score[state]), [state]
    for sources in reversed(back):
        path.append(sources[path[-1]])
    return best, [states[s] for s in reversed(path)]


def collapse(path: Sequence[int]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label != 0]


@pytest.mark.parametrize("word", [[1], [1, 2], [2, 2], [STAR], [1, STAR, 2]])
def test_the_cost_is_that_of_the_most_probable_of_all_paths(word: list[int]) -> None:
    """Brute force over all paths of five frames that collapse to the transcript."""
    log_probs = torch.randn(5, 3, generator=torch.Generator().manual_seed(len(word))).log_softmax(-1).numpy()
    alignment, _ = align(log_probs, [word])
    highest = log_probs.max(axis=1)
    emissions = np.concatenate([log_probs, highest[:, None]], axis=1).astype(np.float64)
    ids = [3 if label == STAR else label for label in word]
    scores = [
        sum(emissions[t, label] for t, label in enumerate(path))
        for path in itertools.product(range(4), repeat=5)
        if collapse(path) == ids
    ]
    written = sum(label != STAR for label in word)
    expected = (highest.sum() - max(scores)) / written if written else math.inf
    assert alignment.cost == pytest.approx(expected, abs=1e-5)
    assert viterbi(emissions, ids)[0] == pytest.approx(max(scores), abs=1e-9)


def test_one_piece_is_the_viterbi_path() -> None:
    rng = np.random.default_rng(0)
    audio, words = MadeAudio(rng, mistakes=0.2), random_words(rng, 25)
    audio.say(words)
    log_probs = audio.log_probs()
    alignment, _ = align(log_probs, words)
    ids = Transcript.from_words(words, [SPACE]).ids.tolist()
    best, path = viterbi(log_probs.astype(np.float64), ids)
    runs = [(label, len(list(run))) for label, run in itertools.groupby(path)]
    edges = np.concatenate([[0], np.cumsum([length for _, length in runs])])
    labels = [(edges[i], edges[i + 1]) for i, (label, _) in enumerate(runs) if label != 0]
    first = np.cumsum([0, *(len(word) + 1 for word in words[:-1])])
    assert alignment.start.tolist() == [labels[i][0] for i in first]
    assert alignment.end.tolist() == [labels[i + len(word) - 1][1] for i, word in zip(first, words, strict=True)]
    assert alignment.cost == pytest.approx((log_probs.max(axis=1).sum() - best) / len(ids), abs=1e-4)
    place = int(first[3])
    word_labels = enumerate(labels[place : place + len(words[3])], start=place)
    posteriors = [np.exp(log_probs[a:b, ids[i]]).mean() for i, (a, b) in word_labels]
    assert alignment.confidence[3] == pytest.approx(np.mean(posteriors), abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_pieces_give_the_alignment_of_a_single_pass(seed: int) -> None:
    rng = np.random.default_rng(seed)
    audio, words = MadeAudio(rng), random_words(rng, 300)
    audio.say(words)
    log_probs = audio.log_probs()
    reads: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> NDArray[np.float32]:
        reads.append((start, stop))
        return log_probs[start:stop]

    best, transcript = log_probs.argmax(axis=1), Transcript.from_words(words, [SPACE])
    pieces = forced_alignment(read, best, transcript, VOCABULARY, SMALL_PIECES)
    assert len(reads) > 20 and reads[0][0] == 0 and reads[-1][1] == len(best)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(reads))
    whole, _ = align(log_probs, words)
    assert pieces.num_guessed == whole.num_guessed == 0
    for name in ("start", "end", "confidence", "cost"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), atol=1e-5, err_msg=name)


def test_memory_does_not_grow_with_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lattice cells of every piece, for an hour of labels."""
    rng = np.random.default_rng(1)
    audio, words = MadeAudio(rng), random_words(rng, 6000)
    spans = audio.say(words)
    log_probs = audio.log_probs()
    cells: list[int] = []

    def counted(emissions: torch.Tensor, ids: torch.Tensor) -> Any:
        cells.append(emissions.shape[1] * (2 * ids.shape[1] + emissions.shape[2]))
        return original(emissions, ids)

    original = module.forced_align
    monkeypatch.setattr(module, "forced_align", counted)
    alignment, reason = align(log_probs, words, AlignmentSettings(piece_cells=500_000, max_cells=1_000_000))
    assert reason is None and len(log_probs) > 80_000
    assert max(cells) <= 500_000 and len(cells) > 100
    assert share_correct(alignment, [start for start, _ in spans]) > 0.99


def test_a_stretch_too_large_to_align_is_guessed_with_confidence_0() -> None:
    rng = np.random.default_rng(2)
    before, unclear, after = (random_words(rng, 60) for _ in range(3))
    audio = MadeAudio(rng, mistakes=0.0)
    first = audio.say(before)
    start = len(audio.labels)
    audio.labels += rng.integers(1, SPACE, 600).tolist()  # other labels than those of the transcript
    end = len(audio.labels)
    last = audio.say(after)
    limits = AlignmentSettings(piece_cells=20_000, max_cells=100_000)
    alignment, reason = align(audio.log_probs(), before + unclear + after, limits)
    assert reason is None and 60 <= alignment.num_guessed < 70
    aligned = alignment.confidence > 0
    truth = np.array([s for s, _ in first] + [0] * 60 + [s for s, _ in last])
    spoken = np.r_[:60, 120:180]
    assert (alignment.start[spoken][aligned[spoken]] == truth[spoken][aligned[spoken]]).all()
    assert not aligned[60:120].any()
    assert (alignment.start[60:120] >= start - 40).all() and (alignment.end[60:120] <= end + 40).all()


def test_a_starred_word_is_aligned_with_unknown_audio() -> None:
    rng = np.random.default_rng(3)
    audio, words = MadeAudio(rng, mistakes=0.0), random_words(rng, 40)
    audio.pauses(20)
    spans = audio.say(words[:20])
    audio.pauses(30)
    [unknown] = audio.say([[7, 3, 9, 12, 5, 5, 8]])
    audio.pauses(30)
    spans += audio.say(words[20:])
    log_probs = audio.log_probs()
    for limits in (ONE_PIECE, SMALL_PIECES):
        alignment, reason = align(log_probs, [*words[:20], [STAR], *words[20:]], limits)
        assert reason is None
        assert abs(alignment.start[20] - unknown[0]) <= 4 and abs(alignment.end[20] - unknown[1]) <= 4
        assert alignment.confidence[20] == min(alignment.confidence[19], alignment.confidence[21]) > 0
        assert np.delete(alignment.start, 20).tolist() == [start for start, _ in spans]


def sentences(rng: np.random.Generator, count: int) -> list[list[list[int]]]:
    return [random_words(rng, 8) for _ in range(count)]


@pytest.mark.parametrize("limits", [ONE_PIECE, SMALL_PIECES], ids=["one piece", "many pieces"])
def test_sentences_missing_from_the_transcript_do_not_move_the_others(limits: AlignmentSettings) -> None:
    rng = np.random.default_rng(4)
    spoken = sentences(rng, 40)
    audio = MadeAudio(rng)
    spans = [audio.say(sentence) for sentence in spoken]
    kept = [number for number in range(40) if number not in (0, 7, 8, 9, 23, 39)]
    alignment, reason = align(audio.log_probs(), [word for number in kept for word in spoken[number]], limits)
    truth = np.array([start for number in kept for start, _ in spans[number]])
    assert reason is None and alignment.num_guessed == 0
    assert share_correct(alignment, truth) > 0.98 and np.abs(alignment.start - truth).max() < 20


def test_sentences_without_audio_do_not_move_the_others() -> None:
    rng = np.random.default_rng(5)
    spoken, foreign = sentences(rng, 40), sentences(rng, 3)
    audio = MadeAudio(rng)
    spans = [span for sentence in spoken for span in audio.say(sentence)]
    text = [*spoken[:10], foreign[0], *spoken[10:30], foreign[1], foreign[2], *spoken[30:]]
    has_audio = np.array([any(sentence is other for other in spoken) for sentence in text for _ in range(8)])
    alignment, reason = align(audio.log_probs(), [word for sentence in text for word in sentence], SMALL_PIECES)
    assert reason is None
    assert (alignment.start[has_audio] == [start for start, _ in spans]).mean() > 0.94
    assert alignment.confidence[~has_audio].mean() < 0.2 and alignment.confidence[has_audio].mean() > 0.8
    assert (np.diff(alignment.start) >= 0).all()


def test_repeated_phrases_keep_their_order() -> None:
    rng = np.random.default_rng(6)
    phrases = sentences(rng, 3)
    words = [word for number in rng.integers(0, 3, 60).tolist() for word in phrases[number]]
    audio = MadeAudio(rng)
    spans = audio.say(words)
    for limits in (ONE_PIECE, SMALL_PIECES):
        alignment, reason = align(audio.log_probs(), words, limits)
        assert reason is None and share_correct(alignment, [start for start, _ in spans]) > 0.99


@pytest.mark.parametrize("music", [False, True], ids=["silence", "music"])
def test_words_are_not_moved_into_silence_or_music(music: bool) -> None:
    rng = np.random.default_rng(7)
    audio, words = MadeAudio(rng), random_words(rng, 80)
    spans = audio.say(words[:40])
    noise = rng.integers(0, SPACE, 4000) * (rng.random(4000) < 0.2) if music else np.zeros(4000, np.int64)
    audio.labels += noise.tolist()
    spans += audio.say(words[40:])
    alignment, reason = align(audio.log_probs(), words, AlignmentSettings(piece_cells=100_000))
    assert reason is None and share_correct(alignment, [start for start, _ in spans]) > 0.95
    far = np.abs(alignment.start - [start for start, _ in spans]) > 40
    assert not any(len(words[i]) > 1 for i in np.flatnonzero(far))  # a single letter matches somewhere in music


def test_shuffled_and_foreign_transcripts_are_refused_and_right_ones_are_not() -> None:
    rng = np.random.default_rng(8)
    refused = {"right": 0, "shuffled": 0, "foreign": 0}
    for count in [6, 10, 20, 60, 200] * 8:
        audio, words = MadeAudio(rng, mistakes=0.25), random_words(rng, count)
        audio.say(words)
        log_probs = audio.log_probs()
        shuffled = [words[i] for i in rng.permutation(count)]
        for name, text in (("right", words), ("shuffled", shuffled), ("foreign", random_words(rng, count))):
            refused[name] += align(log_probs, text, SMALL_PIECES)[1] is not None
    assert refused == {"right": 0, "shuffled": 40, "foreign": 40}


def test_reasons_of_refusals() -> None:
    rng = np.random.default_rng(9)
    audio, words = MadeAudio(rng), random_words(rng, 20)
    audio.say(words)
    log_probs = audio.log_probs()
    assert align(log_probs, words)[1] is None
    assert "too long: " in str(align(log_probs[:60], words)[1])
    assert "can write none" in str(align(log_probs, [[STAR]] * 20)[1])
    assert "nats per label, at most 3" in str(align(log_probs, words[::-1])[1])
    # The transcript has all spoken words and many more, for which the frames of the silence suffice.
    silence = np.concatenate([np.tile(log_probs[:1], (2000, 1)), log_probs])
    assert "nats per label" in str(align(silence, words + random_words(rng, 60))[1])
    with pytest.raises(ValueError, match="has no labels"):
        align(log_probs, [[], []])


def test_words_without_labels_have_no_length() -> None:
    rng = np.random.default_rng(10)
    audio, words = MadeAudio(rng, mistakes=0), random_words(rng, 6)
    spans = audio.say(words)
    alignment, reason = align(audio.log_probs(), [[], words[0], words[1], [], [], *words[2:], []])
    assert reason is None
    for word, (before, edge) in {0: (0, 0), 3: (1, 1), 4: (1, 1), 9: (5, 1)}.items():
        assert alignment.start[word] == alignment.end[word] == spans[before][edge]
    assert np.delete(alignment.start, [0, 3, 4, 9]).tolist() == [start for start, _ in spans]


@given(st.lists(st.integers(0, 6), max_size=60), st.lists(st.integers(1, 6), max_size=60), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_matches_are_equal_labels_in_the_same_order(text: list[int], decoded: list[int], seed: int) -> None:
    # In half of the examples, the sequences are similar.
    rng = np.random.default_rng(seed)
    if seed % 2 and text:
        decoded = [label for label in text if rng.random() < 0.95 and label > 0]
    ids = np.array([label or STAR for label in text], np.int64)
    matched = match_labels(ids, np.array(decoded, np.int64))
    places = np.flatnonzero(matched >= 0)
    assert (np.diff(matched[places]) > 0).all()
    assert [decoded[i] for i in matched[places]] == ids[places].tolist()


def test_a_moved_phrase_does_not_prevent_other_matches() -> None:
    ids = np.random.default_rng(1).integers(1, 30, 2000)
    matched = match_labels(np.concatenate([ids[1960:], ids[:1960]]), ids)
    assert matched[40:].tolist() == list(range(1960)) and (matched[:40] == -1).all()


def test_a_correctly_decoded_transcript_matches_completely() -> None:
    ids = np.random.default_rng(0).integers(1, 30, 5000)
    assert (match_labels(ids, ids) == np.arange(5000)).all()


@given(st.integers(0, 2**32), st.floats(0, 200), st.floats(0, 200), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_word_times_are_ordered_without_overlap_and_within_the_recording(
    seed: int, lead: float, tail: float, count: int
) -> None:
    edges = np.sort(np.random.default_rng(seed).integers(0, 3 * count, 2 * count)).astype(float)
    alignment = Alignment(edges[::2], edges[1::2], np.ones(count), 0.0, 0)
    duration = (edges[-1] + 0.5) * 0.04
    start, end = word_times(alignment, 0.04, duration, AlignmentSettings(lead_ms=lead, tail_ms=tail))
    assert (start >= 0).all() and (end <= duration).all() and (start <= end).all()
    assert (start[1:] >= end[:-1]).all()
    # Every word contains all of its labels.
    assert (start <= edges[::2] * 0.04 + 1e-9).all() and (end >= edges[1::2] * 0.04 - 1e-9).all()


def test_pieces_cover_all_words_and_frames_of_any_audio() -> None:
    rng = np.random.default_rng(11)
    for _ in range(30):
        audio, words = MadeAudio(rng, mistakes=rng.random()), random_words(rng, int(rng.integers(1, 80)))
        audio.say(words[: int(rng.integers(0, len(words) + 1))])
        audio.say(random_words(rng, int(rng.integers(0, 20))))
        best = audio.log_probs().argmax(axis=1)
        transcript = Transcript.from_words([word if rng.random() < 0.9 else [] for word in [[3], *words]], [SPACE])
        pieces = list(plan_pieces(transcript, best, VOCABULARY, 9000, 50_000))
        regions = [region for piece in pieces for region in piece.regions]
        places = [place for piece in pieces for place in piece.places if place >= 0]
        assert (regions[0].first, regions[0].start) == (0, 0)
        assert (regions[-1].stop, regions[-1].end) == (len(words) + 1, len(best))
        assert all(a.stop == b.first and a.end == b.start for a, b in itertools.pairwise(regions))
        word_places = {p for f, s in zip(transcript.first, transcript.stop, strict=True) for p in range(f, s)}
        assert places == sorted(set(places)) and word_places <= set(places)


def test_the_spool_holds_one_recording_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of several recordings share a batch, but the spool holds the recording that was returned last."""
    monkeypatch.setattr(module, "_SPOOL_BYTES", 200)  # small enough for the temporary file
    pairs = [recording(n, seed) for seed, n in enumerate([5, 33, 400, 34, 401])]
    inference = InferenceSettings(context_seconds=100, batch_seconds=300)
    spool = LogProbSpool(5)
    outputs: Callable[..., Any] = model_outputs
    indices = []
    for index, best in outputs(
        LocalModel().log_probs, [s for _, s in pairs], inference, STRIDE, 1.0, reduce=spool.keep
    ):
        source: RecordingSource = pairs[index][1]
        [(_, whole)] = model_outputs(LocalModel().log_probs, [source], inference, STRIDE, 1.0)
        np.testing.assert_allclose(spool.read(0, len(best)), whole.half().float(), rtol=1e-3)
        middle = len(best) // 2
        np.testing.assert_array_equal(spool.read(middle, len(best)), spool.read(0, len(best))[middle:])
        assert best.tolist() == whole.argmax(dim=-1).tolist()
        spool.clear()
        indices.append(index)
    assert indices == list(range(len(pairs)))


def test_bad_settings_name_the_field() -> None:
    invalid: dict[str, Any] = {"max_cost": 0.0, "lead_ms": -1.0, "tail_ms": 5000.0, "piece_cells": 0, "max_cells": 1}
    for field, value in invalid.items():
        with pytest.raises(UserError, match=rf"alignment\.{field} is {value}"):
            replace(AlignmentSettings(), **{field: value})
