"""Corpus of homophones: only cue sentences reveal the topic; voices and splits are those of `synthetic`."""

import hashlib
import random
from itertools import pairwise

import numpy as np
import pytest

from bestrq.scoring.normalisers import normaliser
from common.config import parse as parse_settings
from common.errors import UserError
from data.corpora.espeak import Synthesizer
from data.corpora.homophones import (
    HomophoneSettings,
    HomophoneSource,
    draw_sentence,
    homophones,
    sources,
    word_lists,
)
from data.corpora.registry import CORPORA
from data.corpora.synthetic import VARIANTS, SyntheticSource, sentence_split
from data.features import FeatureSettings

FEATURES = FeatureSettings()
TOPICS = word_lists()["topic"]
SMALL = HomophoneSettings(train_hours=0.02, dev_recordings=2, test_recordings=2, recording_seconds=18, cue_seconds=6)


@pytest.fixture(scope="module")
def loaded() -> list:
    return [(source, source.load(FEATURES)) for source in sources(SMALL)]


def test_homophones_have_the_same_phonemes_and_all_other_words_their_own() -> None:
    lists = word_lists()
    alone_in = {*lists} - {"homophone", "topic", "template"}
    others = {word for name in alone_in for entry in lists[name] for word in entry.split()}
    others |= {"the", "is", "and"}
    with Synthesizer("en-us") as voice:
        writings = zip(*map(homophones, TOPICS), strict=True)
        sounds = [{voice.phonemes(word) for word in written} for written in writings]
        assert all(len(phonemes) == 1 for phonemes in sounds)
        assert len(set.union(*sounds)) == len(sounds)
        alone = {voice.phonemes(word) for word in others}
        assert len(alone) == len(others) and not alone & set.union(*sounds)


def test_topics_share_no_spelling_even_after_normalisation() -> None:
    vocabularies = [{*homophones(topic), *word_lists()[topic]} for topic in TOPICS]
    assert sum(map(len, vocabularies)) == len(set.union(*vocabularies))
    words = sorted(set.union(*vocabularies))
    assert len({normaliser("en").clean(word) for word in words}) == len(words)


def test_a_sentence_without_a_cue_has_the_same_audio_in_every_topic() -> None:
    """Identical samples: without a cue the spelling is ambiguous."""
    first, second = (draw_sentence(random.Random(7), topic, is_cue=False) for topic in TOPICS)
    assert first != second
    with Synthesizer("en-us+f2") as voice:
        audio, times = voice.speak(first)
    with Synthesizer("en-us+f2") as voice:
        other_audio, other_times = voice.speak(second)
    assert np.array_equal(audio, other_audio) and times == other_times


def test_the_grammar_does_not_reveal_the_topic() -> None:
    """The same draws give the same sentence except for its nouns, with and without a cue."""
    nouns = set().union(*map(homophones, TOPICS), *(word_lists()[topic] for topic in TOPICS))
    for seed in range(50):
        drawn = [draw_sentence(random.Random(seed), topic, cue) for topic in TOPICS for cue in (False, True)]
        frames = {tuple("noun" if word in nouns else word for word in sentence) for sentence in drawn}
        assert len(frames) == 1


def test_a_recording_has_one_topic_with_recurring_cues(loaded: list) -> None:
    longer = HomophoneSource("train-00000-castle", "train", "castle", 90.0, 12.0, 0)
    for source, utterance in [*loaded, (longer, longer.load(FEATURES))]:
        words = utterance.recording.words
        said = {word.word for word in words}
        for topic in TOPICS:
            its_own = {*homophones(topic), *word_lists()[topic]}
            assert bool(its_own & said) == (topic == source.topic)
        # The first cue is due after the mean at the latest, later ones after two to four thirds of it; the previous
        # sentence has to end first, and the nouns of a sentence may be seconds apart.
        cues = [word.start for word in words if word.word in word_lists()[source.topic]]
        assert cues[0] < source.cue_seconds + 6
        gaps = [after - before for before, after in pairwise(cues) if after - before > 5]
        assert all(source.cue_seconds * 2 / 3 - 5 < gap < source.cue_seconds * 4 / 3 + 6 for gap in gaps)
        assert source.seconds <= len(utterance.waveform) / FEATURES.sample_rate < source.seconds + 8
    assert len(gaps) >= 5


def test_splits_share_neither_voices_nor_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    speak, current = Synthesizer.speak, ""

    def note(self: Synthesizer, words: list[str]) -> tuple:
        spoken[current].add(" ".join(words))
        return speak(self, words)

    monkeypatch.setattr(Synthesizer, "speak", note)
    for source in sources(SMALL):
        current = source.split
        recording = source.load(FEATURES).recording
        assert recording.split == source.split
        assert recording.speaker.removeprefix("en-") in VARIANTS[source.split]
    assert min(map(len, spoken.values())) > 6
    for split, sentences in spoken.items():
        assert {sentence_split(sentence) for sentence in sentences} == {split}


def test_topics_have_equal_shares_of_every_split() -> None:
    listed = sources(HomophoneSettings(train_hours=1, recording_seconds=60))
    assert len({source.id for source in listed}) == len(listed) == 60 + 12 + 40
    for split in ("train", "dev", "test"):
        counts = [sum(s.split == split and s.topic == topic for s in listed) for topic in TOPICS]
        assert len(set(counts)) == 1


def test_a_recording_is_a_pure_function_of_its_source(loaded: list) -> None:
    for source, first in loaded:
        again = source.load(FEATURES)
        assert first.recording == again.recording and first.waveform.equal(again.waveform)


@pytest.mark.parametrize(
    ("field", "value"),
    [("train_hours", "-1.0"), ("test_recordings", "-2"), ("recording_seconds", "0.0"), ("cue_seconds", "-3.0")],
)
def test_settings_name_the_field_and_the_value(field: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{field} is {value}"):
        parse_settings(HomophoneSettings, [f"--{field}={value}"])


def test_prepare_lists_the_corpus() -> None:
    assert CORPORA["homophones"].settings is HomophoneSettings


@pytest.mark.parametrize(
    ("id", "language", "seconds", "digest"),
    [
        ("train-000007-de", "de", 0.0, "69cf1e38756ba552"),
        ("test-long-000001-en", "en", 70.0, "75752cfcbb2c7871"),
    ],
)
def test_the_texts_of_the_corpus_synthetic_do_not_change(id: str, language: str, seconds: float, digest: str) -> None:
    """Data of the quickstart's figures: hash of the texts, which do not depend on the version of espeak."""
    recording = SyntheticSource(id, id.split("-")[0], language, seconds, 0).load(FEATURES).recording
    assert hashlib.sha256(f"{recording.speaker} {recording.text}".encode()).hexdigest()[:16] == digest
