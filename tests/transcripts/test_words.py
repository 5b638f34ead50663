"""Words from tokens: joined, they are the text, and each lasts as long as its tokens."""

import pytest

from bestrq.decoding.tokens import TimedTokens
from bestrq.transcripts.words import MARK, TimedWord, timed_words

PIECES = ["", MARK + "good", "ness", MARK, "a", MARK + "b", "n" + MARK + "e"]


def words(ids: list[int], first: list[int], last: list[int]) -> list[tuple[str, float, float]]:
    return [(w.word, w.start, w.end) for w in timed_words(TimedTokens(ids, first, last), PIECES, 0.5)]


def test_a_word_lasts_from_its_first_token_to_the_end_of_its_last() -> None:
    assert words([1, 2, 2, 5], [2, 4, 5, 9], [3, 4, 7, 9]) == [("goodnessness", 1.0, 4.0), ("b", 4.5, 5.0)]


@pytest.mark.parametrize("ids", [[4, 3, 4], [3, 4, 3, 3, 4, 3]], ids=["between", "around"])
def test_a_token_of_only_the_marker_is_a_space(ids: list[int]) -> None:
    """With characters and with BPE, a word starts at its first token with letters."""
    frames = [2 * place for place, _ in enumerate(ids)]
    times = [(frame * 0.5, frame * 0.5 + 0.5) for frame, token in zip(frames, ids, strict=True) if token == 4]
    assert words(ids, frames, frames) == [("a", *time) for time in times]


def test_a_text_without_a_leading_mark_starts_with_a_word() -> None:
    assert words([2, 4, 5], [0, 1, 2], [0, 1, 2]) == [("nessa", 0.0, 1.0), ("b", 1.0, 1.5)]


def test_a_mark_within_a_piece_separates_two_words() -> None:
    assert words([5, 6, 4], [0, 1, 2], [0, 1, 2]) == [("bn", 0.0, 1.0), ("ea", 0.5, 1.5)]


def test_words_joined_by_spaces_are_the_text() -> None:
    for ids in ([1, 2, 3, 4, 4, 5], [3, 3], [], [5, 5, 3, 1, 2, 2, 3], [6, 6, 1]):
        text = "".join(PIECES[token] for token in ids).replace(MARK, " ")
        frames = list(range(len(ids)))
        result = timed_words(TimedTokens(ids, frames, frames), PIECES, 0.04)
        assert " ".join(word.word for word in result) == " ".join(text.split())


def test_no_tokens_have_no_words() -> None:
    assert timed_words(TimedTokens([], [], []), PIECES, 0.04) == []
    assert timed_words(TimedTokens([4], [3], [3]), PIECES, 1.0) == [TimedWord("a", 3.0, 4.0)]


def test_a_words_confidence_is_the_mean_of_its_tokens_and_that_of_a_space_counts_for_none() -> None:
    def confidences(ids: list[int], token_confidences: list[float]) -> list[float | None]:
        frames = list(range(len(ids)))
        return [
            word.confidence for word in timed_words(TimedTokens(ids, frames, frames, token_confidences), PIECES, 0.04)
        ]

    assert confidences([1, 2, 3, 4, 5], [0.5, 1.0, 0.1, 0.25, 1.0]) == [0.75, 0.25, 1.0]
    assert confidences([5, 6, 4], [1.0, 0.5, 0.0]) == [0.75, 0.25]  # the token in the middle belongs to both words
    assert confidences([1, 2, 5], []) == [None, None]
