"""Synthetic speech in which only context tells the spelling: a small corpus that shows what long context is worth.

Every recording has one topic. Its sentences name things whose words sound the same in all topics and are written by
the topic (flour, flower), so a listener who does not know the topic can but guess. The topic is told by words of its
own, in a sentence now and then; all other words, and the grammar, are the same in all topics. So a stretch of speech
can be written down without error if, and only if, one of the telling sentences can be heard in it.

Spoken by the voices of the corpus `synthetic`, with its splits: they share neither voices nor sentences.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from common.errors import UserError
from data.audio.reading import resample
from data.corpora.base import Utterance
from data.corpora.grammar import load_grammar, pick
from data.corpora.synthetic import VARIANTS, draw_synthesizer, place_in_room, speak, split_of
from data.features import FeatureSettings
from data.format.schema import Recording

_LANGUAGE = "en"


@dataclass(frozen=True)
class HomophoneSettings:
    """The corpus of homophones."""

    train_hours: float = 4.0
    """Hours of training speech, within a few per cent."""
    dev_recordings: int = 12
    """Recordings in the dev split."""
    test_recordings: int = 40
    """Recordings in the test split."""
    recording_seconds: float = 75.0
    """Length that every recording reaches, in seconds."""
    cue_seconds: float = 12.0
    """Seconds from one sentence that tells the topic to the next, on average: from two thirds of it to four thirds."""
    seed: int = 0
    """Another seed gives other speech."""

    def __post_init__(self) -> None:
        for name in ("train_hours", "dev_recordings", "test_recordings"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: must not be negative")
        for name in ("recording_seconds", "cue_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}: must be positive")


@dataclass(frozen=True)
class HomophoneSource:
    """One recording, on one topic from its beginning to its end."""

    id: str
    split: str
    topic: str
    seconds: float
    cue_seconds: float
    seed: int

    def load(self, features: FeatureSettings) -> Utterance:
        """Speak the recording: its text, words, speaker and sound are a pure function of this source."""
        key = f"{self.seed} {self.id} {self.topic} {self.seconds} {self.cue_seconds}"
        digest = hashlib.sha256(key.encode()).digest()
        rng = random.Random(digest[:16])
        variant = pick(rng, VARIANTS[self.split])
        voice = draw_synthesizer(rng, _LANGUAGE, variant, digest)
        sentences = sentences_on(self.topic, rng, self.split, self.cue_seconds)
        waveform, words = speak(voice, rng, self.seconds, sentences)
        waveform = place_in_room(waveform, np.random.default_rng(list(digest)))
        recording = Recording(
            id=self.id,
            text=" ".join(word.word for word in words),
            words=words,
            language=_LANGUAGE,
            speaker=f"{_LANGUAGE}-{variant}",
            split=self.split,
        )
        return Utterance(recording, resample([waveform], voice.sample_rate, features.sample_rate))


def sources(settings: HomophoneSettings) -> list[HomophoneSource]:
    """All recordings, the topics in turn."""
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
    """The lists of `words/homophones.txt`: section name -> entries."""
    return load_grammar("homophones").lists


@cache
def homophones(topic: str) -> list[str]:
    """How the words that sound the same are written in a topic; number i of all topics is one sound."""
    lists = word_lists()
    number = lists["topic"].index(topic)
    return [entry.split("/")[number] for entry in lists["homophone"]]


def draw_sentence(rng: random.Random, topic: str, is_cue: bool) -> list[str]:
    """The words of one sentence: it names what only this topic has (a cue), or what sounds the same in all topics."""
    lists = word_lists()
    choices = lists | {"noun": lists[topic] if is_cue else homophones(topic)}
    template = pick(rng, lists["template"])
    return re.sub(r"\{(\w+)\}", lambda found: pick(rng, choices[found[1]]), template).split()


def sentences_on(topic: str, rng: random.Random, split: str, cue_seconds: float) -> Callable[[float], list[str]]:
    """(seconds since the beginning) -> the next sentence of a recording, one that belongs to the split."""
    cue_from = rng.random() * cue_seconds

    def draw(now: float) -> list[str]:
        nonlocal cue_from
        is_cue = now >= cue_from
        if is_cue:
            cue_from = now + cue_seconds * (2 + 2 * rng.random()) / 3
        while True:
            sentence = draw_sentence(rng, topic, is_cue)
            if split_of(" ".join(sentence)) == split:
                return sentence

    return draw
