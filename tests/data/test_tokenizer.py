"""Tokenizers: round trips, unknown characters, files, and training texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.text import label_text
from data.shards.inspect import words_between
from data.tokenizer import BLANK, BPETokenizer, CharTokenizer, load_tokenizer
from data.word_times.base import check_word_times

TEXTS = ["the cat sat on the mat", "l'été à noël", "příliš žluťoučký kůň", "the hat of the cat"] * 4
TOKENIZERS = [CharTokenizer.train(TEXTS), BPETokenizer.train(TEXTS, 60)]
KINDS = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["char", "bpe"])


@KINDS
@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.text(sorted(set("".join(TEXTS)) - {" "}), min_size=1, max_size=8), max_size=6))
def test_decode_undoes_encode_and_gives_no_blank(tokenizer: CharTokenizer | BPETokenizer, words: list) -> None:
    text = " ".join(words)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(BLANK < i < tokenizer.vocab_size for i in ids)


@KINDS
def test_blanks_are_skipped_in_decoding(tokenizer: CharTokenizer | BPETokenizer) -> None:
    ids = [x for i in tokenizer.encode("the cat") for x in (BLANK, i)]
    assert tokenizer.decode([*ids, BLANK]) == "the cat"


@KINDS
def test_unknown_characters_are_named(tokenizer: CharTokenizer | BPETokenizer) -> None:
    with pytest.raises(UserError, match=r"'7' \(U\+0037\), '\u03bb' \(U\+03BB\).*train the tokenizer"):
        tokenizer.encode("the \u03bb7 cat")


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_unknown_characters_are_replaced_if_requested(kind: str) -> None:
    known = CharTokenizer.train(TEXTS, True) if kind == "char" else BPETokenizer.train(TEXTS, 60, True)
    ids = known.encode("cat \u03bb")
    assert all(BLANK < i < known.vocab_size for i in ids)
    assert known.decode(ids).startswith("cat ") and "\u2047" in known.decode(ids)


@KINDS
def test_a_saved_tokenizer_is_the_same(tokenizer: CharTokenizer | BPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert all(loaded.encode(text) == tokenizer.encode(text) for text in TEXTS)


@pytest.mark.parametrize("replace_unknown", [False, True])
def test_pieces_name_every_id_in_a_file_of_tokens_separated_by_spaces(replace_unknown: bool) -> None:
    odd = [*TEXTS, "a\u00a0b \u2028c\u2581d\u3000"]
    for known in (CharTokenizer.train(odd, replace_unknown), BPETokenizer.train(odd, 60, replace_unknown)):
        pieces = known.pieces
        assert len(set(pieces)) == len(pieces) == known.vocab_size
        assert all(piece.split() == [piece] for piece in pieces)
        assert pieces[BLANK] == "<blank>" and "\u2581" in "".join(pieces)
        written = " ".join(pieces[i] for i in known.encode("the cat"))
        assert written.replace(" ", "").removeprefix("\u2581") == "the\u2581cat"
        if replace_unknown:
            assert pieces.index("<unk>") in known.encode("\u03bb")


def test_pieces_of_characters_that_a_file_cannot_hold_are_their_code_points() -> None:
    pieces = CharTokenizer([" ", "a", "\u2581", "\u00a0", "\n", "\ud800"]).pieces
    assert pieces == ["<blank>", "\u2581", "a", "<U+2581>", "<U+00A0>", "<U+000A>", "<U+D800>"]


def test_bpe_has_the_requested_vocabulary_and_training_is_deterministic() -> None:
    assert BPETokenizer.train(TEXTS, 60).vocab_size == 60
    assert BPETokenizer.train(TEXTS, 60).model == BPETokenizer.train(TEXTS, 60).model
    with pytest.raises(UserError, match="vocab_size 9000"):
        BPETokenizer.train(TEXTS, 9000)


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"kind": "pickle"}', '{"kind": "char", "characters": []}'])
def test_a_damaged_file_is_a_clear_error(content: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a saved tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_a_bpe_model_that_is_missing_or_garbage_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "bpe"}))
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(UserError, match="SentencePiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("text", "language", "label"),
    [
        ("Hello,  World!\n", "en", "hello world"),
        ("It\u2019s 'quoted' \u2014 ice-cream", "en", "it's quoted ice cream"),
        ("e\u0301te\u0301", "fr", "\u00e9t\u00e9"),
        ("I\u0307zmir", "tr", "izmir"),
        ("DI\u015e I\u0130", "tr", "d\u0131\u015f \u0131i"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947!", "hi", "\u0928\u092e\u0938\u094d\u0924\u0947"),
        ("Room 7 @ 5%", "nl", "room 7 5"),
        ("Room 7 @ 5%", "en", "room 7 5 percent"),
        ("... -- '", "en", ""),
    ],
)
def test_label_text_keeps_words_and_apostrophes_only(text: str, language: str, label: str) -> None:
    assert label_text(text, language) == label
    assert label_text(label, language) == label


def test_adjacent_intervals_share_no_word_and_lose_none() -> None:
    words = [("a", 0.0, 0.4), ("b", 0.4, 1.0), ("c", 1.0, 1.0), ("d", 1.2, 2.0)]
    for cut in (0.2, 0.5, 0.7, 1.0, 1.6):
        assert words_between(words, 0, cut) + words_between(words, cut, 2) == words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([("a", 0.5, 0.4)], "end after its start"),
        ([("a", -0.1, 0.4)], "start at 0"),
        ([("a", float("nan"), 0.4)], "start at 0"),
        ([("a", 1.0, 1.4), ("b", 0.2, 0.5)], "sort the words"),
        ([("a", 1.0, 2.5)], "beyond the recording"),
    ],
)
def test_invalid_word_times_are_named(words: list, message: str) -> None:
    check_word_times([("x", 0.0, 0.5), ("y", 0.4, 2.0)], 2.0, "call")
    with pytest.raises(UserError, match=f"'call', word .*{message}"):
        check_word_times(words, 2.0, "call")
