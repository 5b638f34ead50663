"""Phones of recordings: exact ones of synthetic corpora, and those of espeak for real speech.

A synthetic recording is a pure function of its source, so its phones need no place in the dataset: it is synthesised
again. For other recordings, espeak speaks the transcript: word by word into known word times, or as a phrase, to which
the recording can be aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import read_json_object
from common.text import label_text
from data.corpora import homophones, synthetic
from data.corpora.espeak import Phone, Synthesizer, UnspeakableWord
from data.transcripts import Word

CORPUS_FILE = "corpus.json"
UNKNOWN_PHONE = "?"
# Seconds by which a word may be longer or shorter than the stored one and still have the same phones.
_SAME_LENGTH = 0.005


def is_synthetic(folder: str | Path) -> bool:
    """Return whether a dataset folder was prepared from a corpus whose phones are exact."""
    path = Path(folder) / CORPUS_FILE
    return path.is_file() and read_json_object(path).get("corpus") in ("synthetic", "homophones")


class ExactPhones:
    """Phones of the recordings of a dataset made by `python -m data.prepare synthetic` or `homophones`.

    Raises UserError if corpus.json is missing, damaged or of another corpus.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / CORPUS_FILE
        content = read_json_object(self.path)
        fields: dict[str, Any] = content.get("settings") or {}
        try:
            if content.get("corpus") == "synthetic":
                listed: Sequence[Any] = synthetic.sources(synthetic.SyntheticSettings(**fields))
            elif content.get("corpus") == "homophones":
                listed = homophones.sources(homophones.HomophoneSettings(**fields))
            else:
                raise UserError(
                    f"{self.path}: the corpus is {content.get('corpus')!r}, and only synthetic corpora have exact "
                    "phones: give another phones.source"
                )
        except TypeError as error:
            raise UserError(f"{self.path}: the settings are not those of its corpus ({error})") from error
        self.sources = {source.id: source for source in listed}

    def __call__(self, id: str, stored: Sequence[Word] | None) -> list[Phone]:
        """Phones of a recording, in order; silence between sentences has none.

        With events of phones, espeak pauses differently in a few words. The phones of a word that lasts as long as the
        stored one (within 5 ms) move with it; any other word becomes one phone `UNKNOWN_PHONE`. The first phone of a
        word starts with the word, so it includes the closure of a stop; within a word, espeak counts a closure with the
        phone before.

        Args:
            stored: words of the dataset.

        Raises UserError if the words differ, because the dataset was changed or made by another version.
        """
        if id not in self.sources:
            raise UserError(f"{self.path}: its settings describe no recording {id!r}; prepare the dataset again")
        made, phones = self.sources[id].phones()
        pairs = list(zip(made, stored or [], strict=False))
        equal = [abs((a.end - a.start) - (b.end - b.start)) < _SAME_LENGTH for a, b in pairs]
        if any(a.word != b.word for a, b in pairs) or sum(equal) < 0.8 * max(len(made), len(stored or [])):
            raise UserError(
                f"{self.path}: recording {id!r} has other words than its synthesis today: prepare the dataset again"
            )
        starts = np.array([word.start for word in made])
        word_of = np.searchsorted(starts, [phone.start + 1e-9 for phone in phones], side="right") - 1
        found: list[Phone] = []
        for number, ((word, kept), same) in enumerate(zip(pairs, equal, strict=True)):
            inside = [phones[k] for k in np.flatnonzero(word_of == number)]
            inside = [phone for phone in inside if phone.symbol and phone.start < word.end]
            if not same or not inside:
                found.append(Phone(UNKNOWN_PHONE, kept.start, kept.end))
                continue
            scale = (kept.end - kept.start) / (word.end - word.start)
            edges = [kept.start, *(kept.start + (p.start - word.start) * scale for p in inside[1:]), kept.end]
            found += [
                Phone(phone.symbol, start, end) for phone, start, end in zip(inside, edges, edges[1:], strict=False)
            ]
        return found


def phones_in_words(words: Iterable[Word], language: str) -> list[Phone]:
    """Phones of espeak, stretched to the times of each word; a word that it cannot speak is one `UNKNOWN_PHONE`.

    Within a word the phones keep the proportions of the voice's durations. Raises UserError for an unknown language.
    """
    found: list[Phone] = []
    with _voice(language) as voice:
        for word in words:
            spoken: list[Phone] = []
            for part in label_text(word.word, language).split():
                try:
                    voice.speak([part])
                except UnspeakableWord:
                    spoken = []
                    break
                spoken += [phone for phone in voice.phones if phone.symbol]
            edges = np.cumsum([0.0, *(phone.end - phone.start for phone in spoken)])
            edges = word.start + (word.end - word.start) * edges / max(edges[-1], 1e-9)
            times = zip(edges.tolist(), edges[1:].tolist(), strict=False)
            found += [Phone(phone.symbol, start, end) for phone, (start, end) in zip(spoken, times, strict=True)]
            if not spoken:
                found.append(Phone(UNKNOWN_PHONE, word.start, word.end))
    return found


def speak_transcript(text: str, language: str) -> tuple[NDArray[np.float32], int, list[Phone]] | None:
    """Speak a transcript: waveform float32 [samples], sample rate, phones and pauses.

    None if espeak cannot speak one of the words. Raises UserError for an unknown language.
    """
    words = label_text(text, language).split()
    if not words:
        return None
    with _voice(language) as voice:
        try:
            waveform, _ = voice.speak(words)
        except UnspeakableWord:
            return None
        return waveform, voice.sample_rate, voice.phones


def _voice(language: str) -> Synthesizer:
    voice = Synthesizer(synthetic.BASE_VOICE.get(language, language), with_phones=True)
    try:
        with voice:
            pass
    except RuntimeError as error:
        raise UserError(f"language {language!r}: {error}; give --phones.source none, or characters") from error
    return voice
