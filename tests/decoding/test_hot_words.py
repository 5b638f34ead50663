"""Hot words: final scores count complete phrases only; every matching label adds its weight at once; files."""

import itertools
from pathlib import Path

import pytest
import torch
from tiny_fusion import hot_word_score

from bestrq.decoding.fusion import NO_CONTEXT, Fusion
from bestrq.decoding.hot_words import HotWords, read_hot_words
from common.errors import UserError

SETS = {
    "single": [((1, 2, 3), 1.0)],
    "nested": [((1, 2), 1.0), ((1, 2, 3, 1), 1.0), ((2, 3), 1.0)],
    "start within": [((1, 2, 3, 3), 0.5), ((2, 3), 2.0), ((3,), 0.25), ((2, 3, 1, 2), 1.0)],
    "repeated": [((1, 1), 1.0), ((1, 1, 2), 3.0), ((2, 1, 1, 1), 0.5)],
}


def match_labels(hot_words: HotWords, labels: tuple[int, ...]) -> tuple[float, int]:
    """Total score of labels, and the state after them."""
    total, state = 0.0, 0
    for label in labels:
        state, score = hot_words.advance(state, label)
        total += score
    return total, state


@pytest.mark.parametrize("name", SETS)
def test_the_final_score_is_the_weight_of_the_complete_phrases(name: str) -> None:
    hot_words = HotWords(SETS[name])
    for length in range(8):
        for labels in itertools.product((1, 2, 3), repeat=length):
            total, state = match_labels(hot_words, labels)
            assert total - hot_words.partial_match(state) == pytest.approx(hot_word_score(SETS[name], labels)), labels


def test_every_label_that_continues_a_phrase_adds_its_weight_at_once() -> None:
    hot_words = HotWords([((1, 2, 3), 0.5)])
    assert [match_labels(hot_words, (1, 2, 3, 4)[:count])[0] for count in range(5)] == [0.0, 0.5, 1.0, 1.5, 1.5]
    assert [match_labels(hot_words, (1, 2, 4)[:count])[0] for count in range(4)] == [0.0, 0.5, 1.0, 0.0]
    assert match_labels(hot_words, (1, 2, 1))[0] == 0.5


@pytest.mark.parametrize("name", SETS)
def test_the_row_of_a_context_has_the_score_of_every_label(name: str) -> None:
    hot_words = HotWords(SETS[name])
    fusion = Fusion(5, bonus=0.125, hot_words=hot_words)
    for labels in itertools.product((1, 2, 3), repeat=4):
        context = NO_CONTEXT
        for label in labels:
            context = fusion.advance(context, label)
        expected = [0.0, *(hot_words.advance(context[1], label)[1] + 0.125 for label in range(1, 5))]
        assert fusion.scores([context])[0].tolist() == fusion.label_scores(context, range(5)) == pytest.approx(expected)
        assert fusion.partial_match(context) == hot_words.partial_match(context[1])


class Counting:
    """Language model of order 3 whose scores identify their context."""

    order = 3

    def log_probs(self, context: tuple[int, ...]) -> torch.Tensor:
        return torch.arange(4.0) + 10 * sum(context) + 100 * len(context)


def test_rows_are_correct_when_the_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bestrq.decoding.fusion.CACHE_BYTES", 0)
    fusion = Fusion(4, Counting(), 2.0, 1.0)  # 256 rows
    contexts = [((a, b), 0) for a in range(1, 30) for b in range(1, 30)]
    parts = [contexts[:100], contexts[50:240], contexts[200:300], contexts, contexts[:10]]
    for part in parts:
        expected = [[0.0, *(1 + 2 * (label + 10 * sum(last) + 200) for label in (1, 2, 3))] for last, _ in part]
        assert fusion.scores(part).tolist() == expected
    fusion = Fusion(4, Counting(), 2.0, 1.0)
    for context in contexts:
        assert fusion.label_scores(context, [0, 3]) == [0.0, 1 + 2 * (3 + 10 * sum(context[0]) + 200)]


def encode(text: str) -> list[int]:
    if "?" in text:
        raise ValueError("the character '?' is unknown")
    return [ord(c) for c in text]


def test_a_file_has_one_phrase_per_line_with_an_optional_weight(tmp_path: Path) -> None:
    path = tmp_path / "hot.txt"
    path.write_text("\ufeffab\t2\r\n\n  a c \n", encoding="utf-8")
    hot_words = read_hot_words(path, encode, 0.5)
    assert match_labels(hot_words, tuple(encode("ab")))[0] == 4.0
    assert match_labels(hot_words, tuple(encode("a c")))[0] == 1.5


def test_a_phrase_is_read_with_the_apostrophe_and_without_the_hidden_characters_of_labels(tmp_path: Path) -> None:
    (tmp_path / "hot.txt").write_text("don\u2019t co\u00adop\n", encoding="utf-8")
    encoded: list[str] = []
    read_hot_words(tmp_path / "hot.txt", lambda text: (encoded.append(text), [1])[1], 1.0)
    assert encoded == ["don't coop"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a\nb?\n", r"line 2: the character '\?' is unknown"),
        ("a\tmuch\n", "line 1: could not convert string to float: 'much'"),
        ("a\t-1\n", "line 1: .* weight of -1.0"),
        ("a\tnan\n", "line 1: .* weight of nan"),
        ("\t3\n", "line 1: labels"),
        ("a\t1\tb\n", "line 1: more than one tab"),
        ("\n \n", "has no phrases"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "hot.txt").write_text(text)
    with pytest.raises(UserError, match=match):
        read_hot_words(tmp_path / "hot.txt", encode, 1.0)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hot.txt").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "hot.txt", tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="decoder.hot_words = .* cannot be read"):
            read_hot_words(path, encode, 1.0)


@pytest.mark.parametrize("phrase", [((), 1.0), ((1, 0), 1.0), ((1,), 0.0), ((1,), float("inf"))])
def test_an_invalid_hot_word_is_refused(phrase: tuple[tuple[int, ...], float]) -> None:
    with pytest.raises(ValueError, match="are not a valid hot word"):
        HotWords([phrase])
