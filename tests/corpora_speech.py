"""Synthetic speech in audio formats of corpora, and damaged files for fuzz tests."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.audio.reading import resample
from data.corpora.espeak import Synthesizer
from data.features import FeatureSettings

FEATURES = FeatureSettings()
VOICES = {"en": "en-us", "de": "de", "fr": "fr", "nl": "nl"}
SUBTYPES = {"flac": "PCM_16", "mp3": "MPEG_LAYER_III", "opus": "OPUS", "wav": "PCM_16"}
CONTAINERS = {"opus": "OGG"}


@cache
def speech(text: str, language: str = "en") -> NDArray[np.float32]:
    """Synthetic speech, float32 [samples] at 16 kHz."""
    with Synthesizer(VOICES[language]) as voice:
        waveform, _ = voice.speak(text.lower().split())
        rate = voice.sample_rate
    return resample([waveform], rate, 16000).numpy()


@cache
def encoded(text: str, kind: str, language: str = "en", rate: int = 16000) -> bytes:
    """Content of an audio file of the kind flac, mp3, opus or wav."""
    waveform = speech(text, language)
    if rate != 16000:
        waveform = resample([waveform], 16000, rate).numpy()
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format=CONTAINERS.get(kind, kind.upper()), subtype=SUBTYPES[kind])
    return file.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    """Write a file and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def likeness(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Correlation of two waveforms that differ only by a lossy codec, which may shift them by some samples."""
    size = min(len(a), len(b))
    a, b = a[:size], b[:size]
    spectrum = np.fft.rfft(a, 2 * size) * np.conj(np.fft.rfft(b, 2 * size))
    return float(np.fft.irfft(spectrum).max() / np.sqrt((a @ a) * (b @ b)))


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with a few bytes changed, dropped, inserted or truncated."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["change", "drop", "insert", "cut", "repeat"]))
        if kind == "change" and data:
            data[position] = draw(st.one_of(st.integers(0, 255), st.sampled_from(b'\t\n\r" |;,-.\x00\x85\xff')))
        elif kind == "drop":
            del data[position : position + draw(st.integers(1, 20))]
        elif kind == "insert":
            data[position:position] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "repeat":
            data[position:position] = data[position : position + draw(st.integers(1, 200))]
        elif kind == "cut":
            del data[position:]
    return bytes(data)
