"""Error rates against a hand-computed case and a brute force, normalisers, and bootstrap intervals."""

import json
import random
from functools import cache

import pytest
import torch

from bestrq.decoding.tokens import greedy_ctc
from bestrq.scoring.normalisers import normaliser, normalisers_used
from bestrq.scoring.word_errors import (
    ErrorCounts,
    Mark,
    compare,
    edit_alignment,
    score_by_language,
    score_corpus,
    score_recording,
)
from common.errors import UserError


def levenshtein(reference: tuple, hypothesis: tuple) -> int:
    """Edit distance by its recursive definition."""

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
    assert total.words.rate == 4 / 5  # over the corpus, not the mean of 2/3 and 1/2
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
    ("fr", "C\u0152UR", "coeur"),
    ("ro", "\u015ei \u0163ar\u0103", "\u0219i \u021bar\u0103"),
    ("ro", "s\u0327i", "\u0219i"),  # a combining cedilla
    ("ru", "\u0401\u043b\u043a\u0430", "\u0435\u043b\u043a\u0430"),
    ("de-CH", "Stra\u00dfe", "strasse"),
    ("tr", "I\u0130\u0131i", "\u0131i\u0131i"),
    ("uk", "\u043f\u2019\u044f\u0442\u044c", "\u043f\u02bc\u044f\u0442\u044c"),
    ("ar", "\u0623\u064e\u0628\u0640", "\u0627\u0628"),
    ("he", "\u05e9\u05c1\u05b8", "\u05e9"),
    ("ja", "\u6771\u4eac\u3002", "\u6771 \u4eac"),
])  # fmt: skip
def test_normaliser_by_language(language: str, text: str, expected: str) -> None:
    assert normaliser(language).clean(text) == expected


def test_languages_are_scored_separately_and_together() -> None:
    scores = [score_recording("1", "a b", "a c", "nl"), score_recording("2", "a b", "a b", "cs")]
    totals = score_by_language(scores)
    assert list(totals) == ["cs", "nl", "all"]
    assert [total.words.rate for total in totals.values()] == [0.0, 0.5, 0.25]


def test_normalisers_are_described_with_their_rules_or_a_note_on_languages_without_rules() -> None:
    scores = [score_recording(str(i), "a", "a", language) for i, language in enumerate(["en", "xx", "", "ro-RO", "zh"])]
    assert [score.normaliser for score in scores] == [
        "whisper-english", "unicode", "unicode", "unicode+ro", "unicode+zh",
    ]  # fmt: skip
    assert scores[3].row()["normaliser"] == "unicode+ro"
    used = normalisers_used((score.normaliser, score.language) for score in scores)
    assert list(used) == ["unicode", "unicode+ro", "unicode+zh", "whisper-english"]
    assert used["unicode"]["note"].endswith("not given, xx") and "note" not in used["unicode+ro"]
    assert len(used["unicode+ro"]["rules"]) == 2 and json.dumps(used)
    assert score_recording("1", "don't", "do not", "nl", choice="whisper-english").words.errors == 0
    with pytest.raises(UserError, match="normaliser"):
        normaliser("nl", "none")  # type: ignore[arg-type]


def test_a_language_without_spaces_counts_characters_once() -> None:
    score = score_recording("1", "\u6211\u4eec\u662f", "\u6211\u662f", "zh")
    assert score.words == score.characters == ErrorCounts(hits=2, deletions=1)


def test_two_systems_are_compared_only_on_the_same_texts() -> None:
    first = [score_recording(str(i), "a b c d", "a b c x" if i % 3 else "a b c d", "nl") for i in range(30)]
    second = [score_recording(str(i), "a b c d", "a x c d" if i % 4 else "a x y d", "nl") for i in range(30)]
    comparison = compare(first, second[::-1])
    assert comparison.wer is not None and comparison.wer.difference == (20 - 38) / 120
    assert comparison.wer.interval is not None and comparison.wer.interval[1] < 0
    assert comparison.wer.probability_first_better > 0.99 and comparison.matched_pairs.p_value < 0.001
    assert json.dumps(comparison.summary(), allow_nan=False)
    with pytest.raises(UserError, match="different recordings"):
        compare(first, second[:-1])
    with pytest.raises(UserError, match="different references in the two systems"):
        compare(first, [*second[:-1], score_recording("29", "a b", "a", "nl")])


def test_an_edit_alignment_contains_both_texts() -> None:
    assert edit_alignment("a b c d", "a x c e d") == [
        Mark("equal", "a", "a"), Mark("substitute", "b", "x"), Mark("equal", "c", "c"),
        Mark("insert", "", "e"), Mark("equal", "d", "d"),
    ]  # fmt: skip
    assert edit_alignment("a b", "") == [Mark("delete", "a b", "")]
    assert edit_alignment("", "") == []


def brute_force_collapse(ids: list[int]) -> list[int]:
    merged = [label for t, label in enumerate(ids) if t == 0 or label != ids[t - 1]]
    return [label for label in merged if label != 0]


def test_greedy_ctc_collapses_repeats_then_drops_blanks() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 3, (200, 12), generator=generator)
    lengths = torch.randint(0, 13, (200,), generator=generator)
    expected = [brute_force_collapse(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)]
    assert [tokens.ids for tokens in greedy_ctc(ids, lengths)] == expected
    scores = torch.nn.functional.one_hot(ids, 3).float()
    assert [tokens.ids for tokens in greedy_ctc(scores, lengths)] == expected


def test_token_times_are_the_frames_of_each_run() -> None:
    tokens = greedy_ctc(torch.tensor([[0, 5, 5, 0, 5, 2, 0, 9]]), torch.tensor([7]))[0]
    assert (tokens.ids, tokens.first_frame, tokens.last_frame) == ([5, 5, 2], [1, 4, 5], [2, 4, 5])
