"""Speech synthesis by espeak-ng through ctypes, with the exact time of every word and phone.

The library and its data come from the PyPI package `espeakng-loader`. Two of its properties shape this module:

- Word events of plain text do not correspond to words (phrases such as "out of the" are one unit). Therefore every word
  is converted to phonemes separately, the utterance is synthesised from `[[phonemes]] [[phonemes]] ...`, and an event
  is assigned to its word by its position in this text.
- The synthesiser keeps state between utterances (pitch flutter, glottal cycles, random numbers) that no call resets.
  Therefore a `Synthesizer` loads the library on entry and unloads it on exit (about 3 ms), and its audio is a pure
  function of the calls in between.

The library is not thread-safe and has one instance per process: use processes, and one `Synthesizer` at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Values of speak_lib.h of espeak-ng 1.52.
_SYNCHRONOUS = 2
_BUFFER_MS = 30_000
_CHARS_UTF8_WITH_PHONEMES = 0x001 | 0x100
_EVENT_END_OF_LIST, _EVENT_WORD, _EVENT_CLAUSE_END, _EVENT_PHONEME = 0, 1, 5, 7
_PHONEME_EVENTS_IN_IPA = 0x001 | 0x002  # of espeak_Initialize
_STRESS_MARKS = str.maketrans("", "", "\u02c8\u02cc")
_RATE, _PITCH, _RANGE = 1, 3, 4
_POSITION_IN_CHARACTERS = 1


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class UnspeakableWord(RuntimeError):
    """Word that the voice treats as several words, as a word of another language, or as silence."""


class Phone(NamedTuple):
    """Phone with its times in seconds."""

    symbol: str
    """IPA without stress marks; empty for a pause"""
    start: float
    end: float


class Synthesizer:
    """Voice of espeak-ng in a known state; use it in a `with` block.

    Args:
        voice: name of the voice with a variant, such as `de+f2`.
        words_per_minute: 80 to 450.
        pitch: 0 to 99; default of the voice at 50.
        pitch_range: 0 to 99; default of the voice at 50.
        seed: of the breath noise; below 2**31.
        with_phones: fill `phones`. The audio is not the same: in a few words, the library pauses differently.

    Attributes:
        phones: phones and pauses of the phrase spoken last, from its first to its last sample.

    Raises:
        RuntimeError: unknown voice.
        UnspeakableWord: from `phonemes` and `speak`.
    """

    def __init__(
        self, voice: str, *, words_per_minute: int = 170, pitch: int = 50, pitch_range: int = 50, seed: int = 0,
        with_phones: bool = False,
    ) -> None:  # fmt: skip
        self.voice = voice
        self.with_phones = with_phones
        self.phones: list[Phone] = []
        self._settings = {_RATE: words_per_minute, _PITCH: pitch, _RANGE: pitch_range}
        self._seed = seed
        self._audio: list[bytes] = []
        self._events: list[tuple[int, int, int]] = []  # (type, character position from 1, sample)
        self._phones: list[tuple[str, int]] = []  # (IPA, sample)
        self._callback = _Callback(self._receive)

    def __enter__(self) -> Synthesizer:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            self._start(self._library, espeakng_loader.get_data_path())
        except BaseException:  # a library that stays loaded keeps its state for all later synthesizers
            self._unload()
            raise
        return self

    def _start(self, library: ctypes.CDLL, data: str) -> None:
        self.sample_rate: int = library.espeak_Initialize(
            _SYNCHRONOUS, _BUFFER_MS, data.encode(),
            _PHONEME_EVENTS_IN_IPA if self.with_phones else 0,
        )  # fmt: skip
        if self.sample_rate <= 0:
            raise RuntimeError("espeak-ng did not start: reinstall the package espeakng-loader")
        library.espeak_SetSynthCallback(self._callback)
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        library.espeak_TextToPhonemes.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.c_int, ctypes.c_int]
        library.espeak_Synth.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
            ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        if library.espeak_SetVoiceByName(self.voice.encode()) != 0:
            raise RuntimeError(f"espeak-ng has no voice {self.voice!r}")
        for parameter, value in self._settings.items():
            library.espeak_SetParameter(parameter, value, 0)
        library.espeak_ng_SetRandSeed(ctypes.c_long(self._seed))
        _libc().srand(ctypes.c_uint(self._seed))  # the breath noise comes from libc

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unload()

    def _unload(self) -> None:
        self._library.espeak_Terminate()
        _libc().dlclose(ctypes.c_void_p(self._library._handle))
        del self._library

    def _receive(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        if samples and count > 0:
            self._audio.append(ctypes.string_at(samples, 2 * count))
        index = 0
        while (event := events[index]).type != _EVENT_END_OF_LIST:
            if event.type == _EVENT_PHONEME:
                symbol = event.id.string.decode(errors="replace")
                self._phones.append((symbol.translate(_STRESS_MARKS), event.sample))
            else:
                self._events.append((event.type, event.text_position, event.sample))
            index += 1
        return 0

    def phonemes(self, word: str) -> str:
        """Phonemes of an isolated word, in the notation of espeak."""
        rest = ctypes.c_char_p(word.encode())
        parts = []
        while rest.value is not None:
            part = self._library.espeak_TextToPhonemes(ctypes.byref(rest), 1, 0)
            if part:
                parts.append(part.decode())
        phonemes = "".join(parts)
        # "(en)" stands for a change to the voice of another language within the word.
        if not phonemes or any(mark in phonemes for mark in "([ "):
            raise UnspeakableWord(f"espeak-ng voice {self.voice!r} cannot speak {word!r} as one word: {phonemes!r}")
        return phonemes

    def speak(self, words: Sequence[str]) -> tuple[NDArray[np.float32], list[tuple[float, float]]]:
        """Synthesise a phrase: float32 [samples] in [-1, 1] at `sample_rate`, and start and end of its words in s."""
        text, ends = "", []
        for word in words:
            text += f"[[{self.phonemes(word)}]] "
            ends.append(len(text))
        self._audio.clear()
        self._events.clear()
        self._phones.clear()
        data = text.encode()
        self._library.espeak_Synth(
            data, len(data) + 1, 0, _POSITION_IN_CHARACTERS, 0, _CHARS_UTF8_WITH_PHONEMES, None, None
        )
        samples = np.frombuffer(b"".join(self._audio), dtype=np.int16).astype(np.float32)
        samples /= 32768
        self.phones = self._phone_times(len(samples)) if self.with_phones else []
        return samples, self._word_times(len(samples), words, ends)

    def _word_times(self, samples: int, words: Sequence[str], ends: Sequence[int]) -> list[tuple[float, float]]:
        """Times (s) of the words: from the event of a word to the next event; the end of the phrase is an event too."""
        starts: dict[int, int] = {}
        boundaries = [samples]
        for kind, position, sample in self._events:
            if kind == _EVENT_WORD:
                index = int(np.searchsorted(ends, position))  # position counts from 1
                starts.setdefault(index, sample)
            if kind in (_EVENT_WORD, _EVENT_CLAUSE_END):
                boundaries.append(sample)
        times = []
        for index, word in enumerate(words):
            if index not in starts:
                raise RuntimeError(f"espeak-ng voice {self.voice!r} reported no time for the word {word!r}")
            start = starts[index]
            end = min(boundary for boundary in boundaries if boundary > start)
            times.append((start / self.sample_rate, end / self.sample_rate))
        return times

    def _phone_times(self, samples: int) -> list[Phone]:
        """Phones of the phrase: each lasts until the next one starts; audio before the first is a pause."""
        starts = [("", 0), *self._phones, ("", samples)]
        rate = self.sample_rate
        return [
            Phone(symbol, start / rate, end / rate)
            for (symbol, start), (_, end) in zip(starts, starts[1:], strict=False)
            if end > start
        ]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
