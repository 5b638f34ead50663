"""Error rates against a hand-computed case and a brute force, normalisers, and bootstrap intervals."""

import random
from functools import cache

import numpy as np
import pytest
import torch

from bestrq.recognition.decoding import greedy_ctc, greedy_ctc_timed
from bestrq.recognition.scoring import (
    ErrorCounts,
    Mark,
    align_words,
    bootstrap_interval,
    score_by_language,
    score_corpus,
    score_recording,
    text_normaliser,
)


def levenshtein(reference: tuple, hypothesis: tuple) -> int:
    """Edit distance by its definition."""

    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        substituted = distance(i - 1, j - 1) + (reference[i - 1] != hypothesis[j - 1])
        return min(substituted, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(reference), len(hypothesis))


def test_hand_computed_corpus() -> None:
    scores = [
        score_recording("a", "kocka leze dirou", "kocka lezla dirou pes", "cs", seconds=2.0),  # 1 sub, 1 ins, of 3
        score_recording("b", "pes oknem", "pes", "cs", seconds=1.0),  # 1 del of 2
        score_recording("c", "", "eh", "cs", seconds=0.5),  # 1 ins of 0
    ]
    assert scores[0].words == ErrorCounts(hits=2, substitutions=1, deletions=0, insertions=1)
    assert scores[1].words == ErrorCounts(hits=1, deletions=1)
    # "leze" -> "lezla": one substitution, one insertion; " pes" inserted; " oknem" deleted; "eh" inserted.
    assert scores[0].characters == ErrorCounts(hits=15, substitutions=1, insertions=5)
    assert scores[1].characters == ErrorCounts(hits=3, deletions=6)
    assert scores[2].words.rate is None and scores[2].words.insertions == 1
    total = score_corpus(scores)
    assert total.words.rate == 4 / 5  # over the corpus, not the mean of 2/3, 1/2 and nothing
    assert total.characters.rate == (6 + 6 + 2) / (16 + 9)
    assert (total.num_recordings, total.seconds) == (3, 3.5)


def test_counts_equal_a_brute_force_levenshtein() -> None:
    generator = random.Random(0)
    for _ in range(200):
        reference, hypothesis = (
            " ".join(generator.choices(["a", "b", "ab", "ba"], k=generator.randrange(8))) for _ in range(2)
        )
        score = score_recording("x", reference, hypothesis, "xx")
        assert score.words.errors == levenshtein(tuple(reference.split()), tuple(hypothesis.split()))
        assert score.characters.errors == levenshtein(tuple(reference), tuple(hypothesis))
        assert score.words.reference_length == len(reference.split())


def test_empty_corpus_and_empty_references_have_no_rate() -> None:
    assert score_corpus([]).words.rate is None
    assert score_corpus([]).wer_interval is None
    empty = [score_recording(str(i), "", "", "nl") for i in range(3)]
    assert score_corpus(empty).words.rate is None and score_corpus(empty).wer_interval is None


@pytest.mark.parametrize("language, text, expected", [
    ("en", "Mr. Smith: the colour -- it's TWENTY one!", "mister smith the color it is 21"),
    ("en-GB", "don't", "do not"),
    ("cs", "\u017dLU\u0164OU\u010cK\u00dd,  k\u016f\u0148!", "\u017elu\u0165ou\u010dk\u00fd k\u016f\u0148"),
    ("nl", "'s Avonds  (laat)", "s avonds"),
    ("cs", "e\u030c", "\u011b"),  # decomposed in, composed out
    ("hi", "\u0928\u092e\u0938\u094d\u0924\u0947\u0964", "\u0928\u092e\u0938\u094d\u0924\u0947"),  # vowel signs stay
    ("fr", "", ""),
])  # fmt: skip
def test_normaliser_by_language(language: str, text: str, expected: str) -> None:
    assert text_normaliser(language)(text) == expected


def test_languages_are_scored_apart_and_together() -> None:
    scores = [score_recording("1", "a b", "a c", "nl"), score_recording("2", "a b", "a b", "cs")]
    totals = score_by_language(scores)
    assert list(totals) == ["cs", "nl", "all"]
    assert [total.words.rate for total in totals.values()] == [0.0, 0.5, 0.25]


def test_bootstrap_interval_is_that_of_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    lengths = generator.integers(5, 50, size=40)
    errors = generator.binomial(lengths, 0.3)
    low, high = bootstrap_interval(errors, lengths, num_resamples=20_000, seed=1)
    draws = generator.integers(0, 40, size=(20_000, 40))
    rates = errors[draws].sum(axis=1) / lengths[draws].sum(axis=1)
    expected = np.quantile(rates, [0.025, 0.975])
    assert np.allclose([low, high], expected, atol=0.003)
    assert low < errors.sum() / lengths.sum() < high


def test_bootstrap_is_seeded_and_degenerate_cases_say_nothing() -> None:
    errors, lengths = np.arange(20) ** 2 % 7, np.arange(20) + 7
    assert bootstrap_interval(errors, lengths, 500, seed=4) == bootstrap_interval(errors, lengths, 500, seed=4)
    assert bootstrap_interval(errors, lengths, 500, seed=4) != bootstrap_interval(errors, lengths, 500, seed=5)
    assert bootstrap_interval(errors[:1], lengths[:1]) is None
    assert bootstrap_interval(np.zeros(20), lengths, 100) == (0.0, 0.0)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        lengths = generator.integers(20, 60, size=60)
        low, high = bootstrap_interval(generator.binomial(lengths, 0.2), lengths, 400, seed=trial)
        covered += low <= 0.2 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_aligned_words_give_back_both_texts() -> None:
    assert align_words("a b c d", "a x c e d") == [
        Mark("equal", "a", "a"), Mark("substitute", "b", "x"), Mark("equal", "c", "c"),
        Mark("insert", "", "e"), Mark("equal", "d", "d"),
    ]  # fmt: skip
    assert align_words("a b", "") == [Mark("delete", "a b", "")]
    assert align_words("", "") == []


def brute_force_collapse(ids: list[int]) -> list[int]:
    merged = [one for t, one in enumerate(ids) if t == 0 or one != ids[t - 1]]
    return [one for one in merged if one != 0]


def test_greedy_ctc_collapses_repeats_then_drops_blanks() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (200, 12), generator=generator)
    lengths = torch.randint(0, 13, (200,), generator=generator)
    expected = [brute_force_collapse(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)]
    assert greedy_ctc(ids, lengths) == expected
    scores = torch.nn.functional.one_hot(ids, 3).float()
    assert greedy_ctc(scores, lengths) == expected


def test_token_times_are_the_frames_of_each_run() -> None:
    tokens = greedy_ctc_timed(torch.tensor([[0, 5, 5, 0, 5, 2, 0, 9]]), torch.tensor([7]))[0]
    assert (tokens.ids, tokens.first_frame, tokens.last_frame) == ([5, 5, 2], [1, 4, 5], [2, 4, 5])
