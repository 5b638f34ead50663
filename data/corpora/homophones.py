"""Synthetic speech with context-dependent spelling: a small corpus that measures the benefit of long context.

Every recording has one topic. Its sentences contain homophones whose spelling depends on the topic (flour, flower).
Other words of the topic occur only in occasional cue sentences; all remaining words, and the grammar, are the same for
all topics. Hence a segment can be transcribed without errors if and only if it contains a cue sentence.

Voices and splits are those of the corpus `synthetic`: splits share neither voices nor sentences.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat
from numpy.typing import NDArray

from data.audio.reading import resample
from data.corpora.base import Utterance
from data.corpora.espeak import Phone
from data.corpora.grammar import load_grammar, pick
from data.corpora.synthetic import VARIANTS, draw_synthesizer, place_in_room, sentence_split, speak
from data.features import FeatureSettings
from data.recording import Recording
from data.transcripts import Word

_LANGUAGE = "en"


@dataclass(frozen=True)
class HomophoneSettings:
    """Corpus of homophones."""

    train_hours: NonNegativeFloat = 4.0
    """Hours of training speech, accurate to a few per cent."""
    dev_recordings: NonNegativeInt = 12
    """Recordings in the dev split."""
    test_recordings: NonNegativeInt = 40
    """Recordings in the test split."""
    recording_seconds: PositiveFloat = 75.0
    """Minimum length of a recording in seconds."""
    cue_seconds: PositiveFloat = 12.0
    """Mean time between cue sentences in seconds; it varies from two thirds to four thirds of this."""
    seed: int = 0
    """Seed of all random draws."""


@dataclass(frozen=True)
class HomophoneSource:
    """Recording about a single topic."""

    id: str
    split: str
    topic: str
    seconds: float
    cue_seconds: float
    seed: int

    def load(self, features: FeatureSettings) -> Utterance:
        """Synthesise the recording: text, words, speaker and audio are a pure function of this source."""
        waveform, words, speaker, rate, digest = self._speak()
        waveform = place_in_room(waveform, np.random.default_rng(list(digest)))
        recording = Recording(
            id=self.id,
            text=" ".join(word.word for word in words),
            words=words,
            language=_LANGUAGE,
            speaker=speaker,
            split=self.split,
        )
        return Utterance(recording, resample([waveform], rate, features.sample_rate))

    def phones(self) -> tuple[list[Word], list[Phone]]:
        """Words and exact phones of the recording, which is synthesised again."""
        phones: list[Phone] = []
        words = self._speak(phones)[1]
        return words, phones

    def _speak(self, phones: list[Phone] | None = None) -> tuple[NDArray[np.float32], list[Word], str, int, bytes]:
        """Clean waveform, words, speaker, sample rate, and digest of the source; fills `phones` if it is given."""
        key = f"{self.seed} {self.id} {self.topic} {self.seconds} {self.cue_seconds}"
        digest = hashlib.sha256(key.encode()).digest()
        rng = random.Random(digest[:16])
        variant = pick(rng, VARIANTS[self.split])
        voice = draw_synthesizer(rng, _LANGUAGE, variant, digest, with_phones=phones is not None)
        sentences = sentences_on(self.topic, rng, self.split, self.cue_seconds)
        waveform, words = speak(voice, rng, self.seconds, sentences, phones)
        return waveform, words, f"{_LANGUAGE}-{variant}", voice.sample_rate, digest


def sources(settings: HomophoneSettings) -> list[HomophoneSource]:
    """List all recordings; the topics alternate."""
    topics = word_lists()["topic"]
    counts = {
        "train": round(settings.train_hours * 3600 / settings.recording_seconds),
        "dev": settings.dev_recordings,
        "test": settings.test_recordings,
    }
    listed = []
    for split, count in counts.items():
        for number in range(count):
            topic = topics[number % len(topics)]
            name = f"{split}-{number:05d}-{topic}"
            listed.append(
                HomophoneSource(name, split, topic, settings.recording_seconds, settings.cue_seconds, settings.seed)
            )
    return listed


def word_lists() -> dict[str, list[str]]:
    """Word lists of `words/homophones.txt`: section name -> entries."""
    return load_grammar("homophones").lists


@cache
def homophones(topic: str) -> list[str]:
    """Spellings of the homophones in a topic; number i has the same pronunciation in all topics."""
    lists = word_lists()
    number = lists["topic"].index(topic)
    return [entry.split("/")[number] for entry in lists["homophone"]]


def draw_sentence(rng: random.Random, topic: str, is_cue: bool) -> list[str]:
    """Draw the words of a sentence, with nouns of the topic (a cue sentence) or homophones."""
    lists = word_lists()
    choices = lists | {"noun": lists[topic] if is_cue else homophones(topic)}
    template = pick(rng, lists["template"])
    return re.sub(r"\{(\w+)\}", lambda match: pick(rng, choices[match[1]]), template).split()


def sentences_on(topic: str, rng: random.Random, split: str, cue_seconds: float) -> Callable[[float], list[str]]:
    """Generator of sentences of a recording: (seconds since its start) -> words of a sentence of the split."""
    next_cue = rng.random() * cue_seconds

    def draw(now: float) -> list[str]:
        nonlocal next_cue
        is_cue = now >= next_cue
        if is_cue:
            next_cue = now + cue_seconds * (2 + 2 * rng.random()) / 3
        while True:
            sentence = draw_sentence(rng, topic, is_cue)
            if sentence_split(" ".join(sentence)) == split:
                return sentence

    return draw
