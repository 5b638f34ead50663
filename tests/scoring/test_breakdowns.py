"""Error breakdowns: parts add up to totals, errors count at their times, confusions equal hand counts."""

import json
import random

import pytest

from bestrq.scoring.breakdowns import (
    align_timed,
    by_duration,
    by_edge_distance,
    by_position,
    by_speaker,
    confusions,
    normalised_times,
)
from bestrq.scoring.normalisers import normaliser
from bestrq.scoring.word_errors import ErrorCounts, score_by_language, score_recording
from bestrq.transcripts.words import TimedWord


def timed(text: str, start: float = 0.0, step: float = 1.0) -> list[TimedWord]:
    """Consecutive words of `step` seconds."""
    return [TimedWord(word, start + step * i, start + step * (i + 1)) for i, word in enumerate(text.split())]


def random_texts(seed: int, count: int, letters: str = "abcdef") -> list[tuple[str, str]]:
    generator = random.Random(seed)
    return [
        (" ".join(generator.choices(letters, k=generator.randrange(30))),
         " ".join(generator.choices(letters, k=generator.randrange(30))))
        for _ in range(count)
    ]  # fmt: skip


def test_each_breakdown_adds_up_to_the_total() -> None:
    texts = random_texts(0, 60)
    scores = [
        score_recording(str(i), *pair, language="nl" if i % 3 else "cs", seconds=7.0 * i, speaker=f"s{i % 4}")
        for i, pair in enumerate(texts)
    ]
    total = score_by_language(scores)["all"].words
    aligned = [align_timed(timed(reference), timed(hypothesis), "nl") for reference, hypothesis in texts]
    parts = [
        [score.words for score in by_speaker(scores, 200).values()],
        [score.words for score in by_duration(scores, num_resamples=200).values()],
        [score.words for score in by_position([(words, 30.0) for words in aligned], num_resamples=200)],
        [score.words for score in by_edge_distance([(words, [9.5, 20.0]) for words in aligned], num_resamples=200)],
    ]
    for groups in parts:
        assert len(groups) > 2 and sum(groups, ErrorCounts()) == total
    errors = confusions(scores, most=1000)
    counts = [sum(row[-1] for row in rows) for rows in (errors.substitutions, errors.deletions, errors.insertions)]
    assert counts == [total.substitutions, total.deletions, total.insertions]


def test_errors_count_in_the_decile_of_their_time() -> None:
    # 20 words in 20 s, two per decile; the third is wrong, the last is missing; insertions at 5.2 s and after the end.
    reference = "a b c d e f g h i j k l m n o p q r s t"
    words = timed(reference.replace("c", "x"))[:-1]
    words[7] = TimedWord("h", 14.0, 15.0)  # far too late: in the reference it is at 7.5 s
    words = [*words[:5], TimedWord("uh", 5.1, 5.3), *words[5:], TimedWord("um", 25.0, 26.0)]
    bins = by_position([(align_timed(timed(reference), words, "nl"), 20.0)])
    assert [bin.low for bin in bins] == pytest.approx([i / 10 for i in range(10)]) and bins[-1].high == 1.0
    assert bins[1].words == ErrorCounts(hits=1, substitutions=1)
    assert bins[2].words == ErrorCounts(hits=2, insertions=1)
    assert bins[9].words == ErrorCounts(hits=1, substitutions=1)  # "um" for the last word, at the time of the reference
    assert all(bins[i].words == ErrorCounts(hits=2) for i in (0, 3, 4, 5, 6, 7, 8))
    assert json.dumps([bin.summary() for bin in bins])


def test_errors_count_by_distance_from_the_nearest_edge() -> None:
    words = align_timed(timed("a b c d e f"), timed("a b x d e f"), "nl")  # middles 0.5, 1.5, ... the error at 2.5
    bins = by_edge_distance([(words, [2.4, 40.0]), (words, [])], edges=[0.0, 0.5, 2.0])  # the second has one window
    assert [bin.words for bin in bins] == [
        ErrorCounts(substitutions=1), ErrorCounts(hits=3), ErrorCounts(hits=2),
    ]  # fmt: skip
    assert [(bin.low, bin.high) for bin in bins] == [(0.0, 0.5), (0.5, 2.0), (2.0, None)]


def test_recordings_are_grouped_by_length_with_the_shortest_first() -> None:
    scores = [score_recording(str(n), "a", "a", "nl", seconds=n) for n in (4000, 100, 9.99, 300, 10, 29)]
    groups = by_duration(scores)
    counts = [(name, score.num_recordings) for name, score in groups.items()]
    assert counts == [
        ("0 to 10 s", 1), ("10 to 30 s", 2), ("60 to 300 s", 1), ("300 to 900 s", 1), ("3600 s and more", 1),
    ]  # fmt: skip


def test_confusions_counted_by_hand_with_ties_in_alphabetical_order() -> None:
    texts = [("a b c", "a x c"), ("a b", "a x"), ("d e", "d"), ("f", "f g"), ("k m", "k o"), ("k l", "k o")]
    errors = confusions([score_recording(str(i), *pair, language="nl") for i, pair in enumerate(texts)], most=2)
    assert errors.substitutions == [("b", "x", 2), ("l", "o", 1)]
    assert (errors.deletions, errors.insertions) == ([("e", 1)], [("g", 1)])


def test_normalised_words_have_the_times_of_their_source_words() -> None:
    clean = normaliser("en").clean
    words, times = normalised_times(timed("Well, don't take twenty one - uh colours!"), clean)
    assert words == "well do not take 21 colors".split()
    assert times[:4] == pytest.approx([0.5, 1.25, 1.75, 2.5])
    assert 3.0 <= times[4] <= 5.0 and times[5] == pytest.approx(7.5)
    assert normalised_times([], clean)[0] == [] and normalised_times(timed("uh"), clean)[0] == []


def test_a_reference_without_times_takes_those_of_the_hypothesis() -> None:
    aligned = align_timed("a b c d e", timed("a x e", start=10.0, step=2.0), "nl")
    assert [word.reference for word in aligned if word.reference] == ["a", "b", "c", "d", "e"]
    times = [word.time for word in aligned if word.reference]
    assert times == sorted(times) and (times[0], times[-1]) == (11.0, 15.0)
    spread = align_timed("a b c d", timed("a d", start=10.0, step=2.0), "nl")
    assert [word.time for word in spread] == pytest.approx([11.0, 11 + 2 / 3, 12 + 1 / 3, 13.0])
    # Deleted words lie between the recognised ones and the ends of the recording.
    assert [word.time for word in align_timed("a b c", [], "nl", 8.0)] == [2.0, 4.0, 6.0]
    tail = align_timed("a b c d", timed("a b", step=2.0), "nl", 9.0)
    assert [word.time for word in tail] == [1.0, 3.0, 5.0, 7.0]
    assert align_timed("", timed("a"), "nl")[0].kind == "insertion"
