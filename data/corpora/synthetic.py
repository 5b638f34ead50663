"""Synthetic speech: sentences from small grammars, synthesised by espeak-ng, with exact word times.

Every recording is a pure function of its source (seed, id, language, length), so its content depends on neither the
worker nor an interruption. Splits share neither voices (a language with a variant of espeak) nor sentences (split by
hash). Invented words cannot be memorised, so their spelling must be recognised from the audio.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat
from numpy.typing import NDArray

from common.hashing import hash_share
from data.audio.reading import resample
from data.corpora.base import Utterance, check_not_empty
from data.corpora.espeak import Phone, Synthesizer, UnspeakableWord
from data.corpora.grammar import LANGUAGES, Grammar, Language, Topic, load_grammar, pick
from data.features import FeatureSettings
from data.recording import Recording
from data.transcripts import Word

# Base voices of espeak whose name is not the code of the language.
BASE_VOICE = {"en": "en-us"}
# Variants of the base voices, selected by listening and level (no whispers, no robots).
VARIANTS = {
    "train": (
        "m1", "m2", "m3", "m4", "m6", "m7", "f1", "f2", "f4", "f5", "Alicia", "Andy", "Annie", "Lee", "Michael", "Reed",
        "adam", "aunty", "belinda", "david", "klatt3", "max", "michel", "quincy", "robert", "steph",
    ),
    "dev": ("caleb", "linda", "m8"),
    "test": ("Mario", "f3", "m5", "rob", "shelby"),
}  # fmt: skip
# Shares of the sentences, by hash, in test and dev; the rest is in train.
_TEST_SHARE, _DEV_SHARE = 0.06, 0.06
# Sentences are added until the utterance reaches a length drawn from this range, so it lasts 2 to 15 s.
_SHORTEST_S, _LONGEST_S = 2.0, 9.8
_MEAN_UTTERANCE_S = 7.3  # measured over all languages; converts hours to a number of utterances
_SECONDS_ON_A_TOPIC = 60.0


@dataclass(frozen=True)
class SyntheticSettings:
    """Synthetic corpus."""

    languages: list[Language] = field(default_factory=lambda: ["en", "de", "es", "cs"])
    """Languages, with equal shares of the utterances; a language that is given n times has n shares. Known: en, de, fr,
    es, it, nl, cs."""
    train_hours: NonNegativeFloat = 4.0
    """Hours of training speech, accurate to a few per cent."""
    train_long_share: ClosedUnitInterval = 0.2
    """Share of the training hours in long recordings."""
    dev_utterances: NonNegativeInt = 60
    """Short utterances in the dev split."""
    test_utterances: NonNegativeInt = 60
    """Short utterances in the test split."""
    test_long_recordings: NonNegativeInt = 3
    """Long recordings in the test split, each with one voice and recurring topics."""
    long_minutes: PositiveFloat = 10.5
    """Minimum length of a long recording in minutes."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        check_not_empty("languages", self.languages, LANGUAGES)


@dataclass(frozen=True)
class SyntheticSource:
    """Synthetic recording of at least `seconds`; 0 is a short utterance of random length."""

    id: str
    split: str
    language: str
    seconds: float
    seed: int

    def load(self, features: FeatureSettings) -> Utterance:
        """Synthesise the recording: text, words, speaker and audio are a pure function of this source."""
        waveform, words, speaker, rate, digest = self._speak()
        waveform = place_in_room(waveform, np.random.default_rng(list(digest)))
        recording = Recording(
            id=self.id,
            text=" ".join(word.word for word in words),
            words=words,
            language=self.language,
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
        digest = hashlib.sha256(f"{self.seed} {self.id} {self.language} {self.seconds}".encode()).digest()
        rng = random.Random(digest[:16])
        variant = pick(rng, VARIANTS[self.split])
        seconds = self.seconds or _SHORTEST_S + (_LONGEST_S - _SHORTEST_S) * rng.random()
        grammar = load_grammar(self.language)
        topics = [grammar.topic(rng) for _ in range(3)] if self.seconds else None
        voice = draw_synthesizer(rng, self.language, variant, digest, with_phones=phones is not None)
        waveform, words = speak(voice, rng, seconds, _sentences(grammar, rng, self.split, topics), phones)
        return waveform, words, f"{self.language}-{variant}", voice.sample_rate, digest


def sources(settings: SyntheticSettings) -> list[SyntheticSource]:
    """List long recordings first (they take longest), then short utterances; the languages alternate."""
    long_seconds = settings.long_minutes * 60
    train_seconds = settings.train_hours * 3600
    counts = [
        ("train", long_seconds, round(train_seconds * settings.train_long_share / long_seconds)),
        ("test", long_seconds, settings.test_long_recordings),
        ("train", 0.0, math.ceil(train_seconds * (1 - settings.train_long_share) / _MEAN_UTTERANCE_S)),
        ("dev", 0.0, settings.dev_utterances),
        ("test", 0.0, settings.test_utterances),
    ]
    listed = []
    for split, seconds, count in counts:
        for number in range(count):
            language = settings.languages[number % len(settings.languages)]
            name = f"{split}-{'long-' if seconds else ''}{number:06d}-{language}"
            listed.append(SyntheticSource(name, split, language, seconds, settings.seed))
    return listed


def sentence_split(sentence: str) -> str:
    """Split of a sentence, the same for all voices."""
    share = hash_share(sentence)
    return "test" if share < _TEST_SHARE else "dev" if share < _TEST_SHARE + _DEV_SHARE else "train"


def draw_synthesizer(
    rng: random.Random, language: str, variant: str, digest: bytes, with_phones: bool = False
) -> Synthesizer:
    """Synthesizer with a random speed and pitch; bytes 16 to 19 of the digest are the seed of its breath noise."""
    return Synthesizer(
        f"{BASE_VOICE.get(language, language)}+{variant}",
        words_per_minute=140 + int(50 * rng.random()),
        pitch=35 + int(30 * rng.random()),
        pitch_range=35 + int(30 * rng.random()),
        seed=int.from_bytes(digest[16:20], "big") >> 1,
        with_phones=with_phones,
    )


def _sentences(
    grammar: Grammar, rng: random.Random, split: str, topics: list[Topic] | None
) -> Callable[[float], list[str]]:
    """Generator of sentences of a recording: (seconds since its start) -> words of a sentence of the split."""

    def draw(now: float) -> list[str]:
        # The topics alternate, so that each recurs after a few minutes.
        topic = topics[int(now / _SECONDS_ON_A_TOPIC) % len(topics)] if topics else None
        while True:
            sentence = grammar.sentence(rng, topic)
            if sentence_split(" ".join(sentence)) == split:
                return sentence

    return draw


def speak(
    synthesizer: Synthesizer, rng: random.Random, seconds: float, next_sentence: Callable[[float], list[str]],
    phones: list[Phone] | None = None,
) -> tuple[NDArray[np.float32], list[Word]]:  # fmt: skip
    """Synthesise sentences with pauses between them until `seconds` are reached.

    Args:
        next_sentence: seconds since the start -> words.
        phones: list to extend by the phones of the synthesizer; silence between sentences has none.

    Returns:
        float32 [samples] at the voice's rate, words with times in seconds.
    """
    pieces: list[NDArray[np.float32]] = []
    words: list[Word] = []
    with synthesizer as voice:
        samples = 0

        def append(piece: NDArray[np.float32]) -> None:
            nonlocal samples
            pieces.append(piece)
            samples += len(piece)

        append(_silence(0.1 + 0.3 * rng.random(), voice.sample_rate))
        while samples < seconds * voice.sample_rate:
            now = samples / voice.sample_rate
            sentence = next_sentence(now)
            try:
                audio, times = voice.speak(sentence)
            except UnspeakableWord:  # rare: an invented word that the voice treats as foreign
                continue
            words += [Word(word, now + start, now + end) for word, (start, end) in zip(sentence, times, strict=True)]
            if phones is not None:
                phones += [Phone(symbol, now + start, now + end) for symbol, start, end in voice.phones]
            append(audio)
            append(_silence(0.15 + 0.4 * rng.random(), voice.sample_rate))
    return np.concatenate(pieces), words


def _silence(seconds: float, rate: int) -> NDArray[np.float32]:
    return np.zeros(int(seconds * rate), dtype=np.float32)


def place_in_room(waveform: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Add a random level and noise: peak 0.1 to 0.9 of full scale, white noise 25 to 50 dB below speech."""
    gain = 10 ** (rng.uniform(-20, -1) / 20) / max(float(np.abs(waveform).max()), 1e-3)
    level = float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))
    noise = rng.standard_normal(len(waveform), dtype=np.float32)
    noise *= np.float32(level * 10 ** (-rng.uniform(25, 50) / 20))
    return ((waveform + noise) * np.float32(gain)).astype(np.float32)
