"""Phones of synthetic corpora and of espeak's speech for known words."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.corpora import homophones, synthetic
from data.corpora.espeak import Phone, Synthesizer
from data.corpora.phones import (
    UNKNOWN_PHONE,
    ExactPhones,
    is_synthetic,
    phones_in_words,
    speak_transcript,
)
from data.transcripts import Word

SETTINGS = synthetic.SyntheticSettings(
    languages=["en", "cs"], train_hours=0.02, train_long_share=0, test_long_recordings=0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the corpus.json of a synthetic corpus."""
    folder = tmp_path_factory.mktemp("synthetic")
    content = {"corpus": "synthetic", "settings": dataclasses.asdict(SETTINGS)}
    (folder / "corpus.json").write_text(json.dumps(content))
    return folder


def stored_words(source: synthetic.SyntheticSource) -> list[Word]:
    return source._speak()[1]


def test_phones_fill_every_word_in_order(folder: Path) -> None:
    exact = ExactPhones(folder)
    unknown = total = 0.0
    for source in synthetic.sources(SETTINGS)[:8]:
        words = stored_words(source)
        phones = exact(source.id, words)
        assert all(a.end <= b.start + 1e-9 and a.start < a.end for a, b in zip(phones, phones[1:], strict=False))
        for word in words:
            inside = [p for p in phones if word.start - 1e-9 <= p.start < word.end - 1e-9]
            assert inside[0].start == pytest.approx(word.start) and inside[-1].end == pytest.approx(word.end)
            length = sum(p.end - p.start for p in inside)
            assert length == pytest.approx(word.end - word.start)
            total += length
            unknown += sum(p.end - p.start for p in inside if p.symbol == UNKNOWN_PHONE)
    assert unknown / total < 0.15


def test_equal_words_have_equal_phones_wherever_they_are(folder: Path) -> None:
    """Phones of a word are its own: a shift by one word would mix them."""
    exact = ExactPhones(folder)
    spellings: dict[tuple[str, str], set[str]] = {}
    for source in [s for s in synthetic.sources(SETTINGS) if s.language == "cs"][:12]:
        words = stored_words(source)
        phones = exact(source.id, words)
        for word in words:
            inside = [p.symbol for p in phones if word.start - 1e-9 <= p.start < word.end - 1e-9]
            if UNKNOWN_PHONE not in inside:
                spellings.setdefault((source.language, word.word), set()).add(" ".join(inside))
    repeated = [forms for forms in spellings.values() if len(forms) > 0]
    assert len(repeated) > 40 and np.mean([len(forms) == 1 for forms in repeated]) > 0.95


def test_homophones_share_their_phones(tmp_path: Path) -> None:
    settings = homophones.HomophoneSettings(train_hours=0, dev_recordings=2, test_recordings=0, recording_seconds=8)
    content = {"corpus": "homophones", "settings": dataclasses.asdict(settings)}
    (tmp_path / "corpus.json").write_text(json.dumps(content))
    assert is_synthetic(tmp_path)
    source = homophones.sources(settings)[0]
    phones = ExactPhones(tmp_path)(source.id, source._speak()[1])
    assert len(phones) > 30 and all(p.symbol for p in phones)


def test_other_words_than_those_of_the_corpus_are_an_error(folder: Path) -> None:
    source = synthetic.sources(SETTINGS)[0]
    words = stored_words(source)
    exact = ExactPhones(folder)
    with pytest.raises(UserError, match="has other words than its synthesis today"):
        exact(source.id, [Word("changed", *words[0][1:]), *words[1:]])
    with pytest.raises(UserError, match="has other words"):
        exact(source.id, words[: len(words) // 2])
    with pytest.raises(UserError, match="has other words"):
        exact(source.id, [Word(w.word, w.start, w.end + 0.02) for w in words])
    with pytest.raises(UserError, match="no recording 'other'"):
        exact("other", words)


def test_another_corpus_is_an_error_and_not_synthetic(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text(json.dumps({"corpus": "folder", "settings": {}}))
    assert not is_synthetic(tmp_path) and not is_synthetic(tmp_path / "missing")
    with pytest.raises(UserError, match="only synthetic corpora have exact phones"):
        ExactPhones(tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps({"corpus": "synthetic", "settings": {"colour": 1}}))
    with pytest.raises(UserError, match="not those of its corpus"):
        ExactPhones(tmp_path)


def test_phones_of_words_keep_the_times_of_the_words() -> None:
    words = [Word("dobr\u00fd", 1.0, 1.6), Word("den", 1.7, 1.9)]
    phones = phones_in_words(words, "cs")
    assert [p.symbol for p in phones][:1] == ["d"] and [p.symbol for p in phones][-1] == "n"
    assert phones[0].start == 1.0 and phones[-1].end == pytest.approx(1.9)
    assert any(p.end == pytest.approx(1.6) for p in phones) and any(p.start == 1.7 for p in phones)
    # A word without letters.
    assert phones_in_words([Word("...", 2.0, 2.5)], "cs") == [Phone(UNKNOWN_PHONE, 2.0, 2.5)]


def test_an_unknown_language_is_an_error() -> None:
    with pytest.raises(UserError, match="language 'xx-none'"):
        phones_in_words([Word("a", 0.0, 1.0)], "xx-none")


def test_a_transcript_without_words_has_no_speech() -> None:
    assert speak_transcript("...", "en") is None


def test_phones_are_in_ipa_without_stress_and_cover_the_phrase() -> None:
    waveform, rate, phones = speak_transcript("Hello, world!", "en") or (None, 0, [])
    assert waveform is not None and phones[0].start == 0
    assert phones[-1].end == pytest.approx(len(waveform) / rate)
    assert all(a.end == b.start for a, b in zip(phones, phones[1:], strict=False))
    text = "".join(p.symbol for p in phones)
    assert text.startswith("h") and text.endswith("ld") and not set(text) & set("\u02c8\u02cc'")


def test_a_voice_without_phones_is_unchanged() -> None:
    """Datasets are synthesised without events of phones, whose audio differs."""
    with Synthesizer("en-us") as voice:
        voice.speak(["hello"])
        assert voice.phones == []
