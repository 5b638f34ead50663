"""Audio files with an unusual structure: metadata that resembles another stream, unset or too small lengths."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from common.errors import UserError
from data.audio import opening as audio_open
from data.audio.reading import audio_blocks, audio_seconds
from data.corpora.audio_files import FileSource
from data.prepare.extraction import Extracted, extract
from data.recording import Recording
from tests.data.audio.test_audio import (
    FORMATS,
    ID3,
    ID3V1,
    RATE,
    SETTINGS,
    chunk,
    encoded,
    noise,
    uncounted,
    wav,
    write,
)
from tests.decoded_audio import read_audio


def samples_of(content: bytes, path: Path) -> int:
    """Read from a file and from memory, without a warning."""
    result = extract(FileSource(Recording("a"), write(path, content)), SETTINGS)
    assert isinstance(result, Extracted) and not result.warnings, result
    segment = read_audio(path, SETTINGS)
    assert torch.equal(segment, read_audio(io.BytesIO(content), SETTINGS))
    return len(segment)


def warning_of(content: bytes, path: Path) -> str:
    result = extract(FileSource(Recording("a"), write(path, content)), SETTINGS)
    assert isinstance(result, Extracted)
    (warning,) = result.warnings
    return warning


# Data that resemble the start of a second stream


def with_block(flac: bytes, kind: int, body: bytes) -> bytes:
    """FLAC with another metadata block after STREAMINFO."""
    return flac[:42] + bytes([kind]) + len(body).to_bytes(3, "big") + body + flac[42:]


def test_flac_bytes_in_flac_metadata_are_not_a_second_stream(tmp_path: Path) -> None:
    flac, other = encoded("flac", noise(3)), encoded("flac", noise(1))
    comment = struct.pack("<I4sII", 4, b"test", 1, 15) + b"TITLE=fLaC\0\0\0\x22!"
    picture = struct.pack(">II9s20xI", 3, 9, b"image/png", len(other)) + other
    bodies = {2: b"test" + other, 4: comment, 6: picture, 1: bytes(1 << 21), 3: b"\xff" * 180}
    for kind, body in bodies.items():
        for content in (with_block(flac, kind, body), ID3 + uncounted(with_block(flac, kind, body))):
            assert samples_of(content, tmp_path / f"{kind}.flac") == 3 * RATE
            with pytest.raises(UserError, match="several streams"):
                read_audio(write(tmp_path / "two.flac", content + other), SETTINGS)


def test_flac_bytes_in_flac_audio_are_not_a_second_stream(tmp_path: Path) -> None:
    """Full-scale noise is stored verbatim."""
    samples = np.random.default_rng(0).integers(-32768, 32768, size=3 * RATE).astype(np.int16)
    marks = np.frombuffer(b"fLaC\0\0\0\x22OggS\0\2RIFF", ">i2").astype(np.int16)
    for place in range(100, len(samples) - 100, 200):
        samples[place : place + len(marks)] = marks
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, "PCM_16", format="FLAC")
    assert file.getvalue().count(b"fLaC\0\0\0\x22") > 10
    assert samples_of(file.getvalue(), tmp_path / "a.flac") == len(samples)


def ogg_page(content: bytes, flags: int, stream: int, number: int) -> bytes:
    """Page with one packet of fewer than 255 bytes."""
    head = struct.pack("<4sBBqIII", b"OggS", 0, flags, 0, stream, number, 0) + bytes([1, len(content)])
    crc = 0
    for byte in head + content:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7) & 0xFFFFFFFF if crc & 0x80000000 else crc << 1
    return head[:22] + struct.pack("<I", crc) + head[26:] + content


@pytest.mark.parametrize("kind", ["ogg", "opus"])
def test_multiplexed_ogg_streams_and_bytes_within_pages_are_not_a_second_stream(kind: str, tmp_path: Path) -> None:
    whole = encoded(kind, noise(3))
    first = whole.index(b"OggS", 4)
    other = [
        ogg_page(b"fishead\0", 2, 7, 0),
        ogg_page(b"\x80 OggS\0\2 OggS\0\2", 0, 7, 1),
        ogg_page(b"", 4, 7, 2),
    ]
    multiplexed = whole[:first] + other[0] + whole[first:-1] + whole[-1:]
    second = multiplexed.index(b"OggS", first + len(other[0]) + 4)
    multiplexed = multiplexed[:second] + other[1] + other[2] + multiplexed[second:]
    assert samples_of(multiplexed, tmp_path / f"a.{kind}") == 3 * RATE
    for tail in (ID3V1, bytes(70_000), b"OggS of no page"):
        assert samples_of(whole + tail, tmp_path / f"b.{kind}") == 3 * RATE
    with pytest.raises(UserError, match="several streams"):
        read_audio(write(tmp_path / "c", multiplexed + multiplexed), SETTINGS)
    for lost in (1, 10, 100):
        with pytest.raises(UserError, match="truncated"):
            read_audio(write(tmp_path / "d", multiplexed[:-lost]), SETTINGS)


# Lengths that are unset, too small or missing


@pytest.mark.parametrize("size", [0, 36, 0xFFFFFFFF])
def test_a_wav_whose_length_was_never_set_is_read_to_its_end(size: int, tmp_path: Path) -> None:
    """Left by a killed recorder, or written to a pipe."""
    content = wav(noise(3), data=0, size=size)
    assert samples_of(content, tmp_path / "a.wav") == 3 * RATE
    segment = FileSource(Recording("a"), tmp_path / "a.wav", 1.0, 1.5).load(SETTINGS).waveform
    assert torch.equal(segment, read_audio(tmp_path / "a.wav", SETTINGS)[RATE : RATE * 5 // 2])
    big = encoded("wav", noise(3), endian="BIG")
    place = big.index(b"data") + 4
    assert samples_of(big[:place] + bytes(4) + big[place + 4 :], tmp_path / "c.wav") == 3 * RATE


def test_a_wav_without_samples_is_still_an_error(tmp_path: Path) -> None:
    empty = wav(noise(3)[:0])
    for content in (empty, empty + ID3V1, empty + bytes(50_000), encoded("wav", noise(1)[:0])):
        with pytest.raises(UserError, match="holds no audio samples"):
            read_audio(write(tmp_path / "a.wav", content), SETTINGS)


@pytest.mark.parametrize("kind", ["wav", "rf64", "aif", "au", "caf"])
def test_audio_after_the_declared_length_gives_a_warning(kind: str, tmp_path: Path) -> None:
    """Header that was not updated, or counts more than 4 GiB in 32 bits."""
    shorter, longer = encoded(kind, noise(2)), encoded(kind, noise(3))
    content = shorter + longer[-2 * RATE :]
    assert f"2.00 s of audio; {2 * RATE} bytes after" in warning_of(content, tmp_path / f"a.{kind}")
    assert samples_of(shorter + longer[-1000:], tmp_path / f"b.{kind}") == 2 * RATE


@pytest.mark.parametrize("kind", ["w64", "sph"])
def test_audio_after_the_declared_length_is_read_if_libsndfile_reads_it(kind: str, tmp_path: Path) -> None:
    content = encoded(kind, noise(2)) + encoded(kind, noise(3))[-2 * RATE :]
    assert samples_of(content, tmp_path / f"a.{kind}") == 3 * RATE


def test_other_data_after_the_declared_length_give_no_warning(tmp_path: Path) -> None:
    picture = b"ID3\x03\0\0\0\0\x40\0" + np.random.default_rng(0).bytes(0x40 << 7)
    for odd in (False, True):
        whole = wav(noise(3), odd=odd)
        large = chunk(b"id3 ", np.random.default_rng(0).bytes(50_001))
        for tail in (large, large[:-10_000], picture, ID3V1, bytes(50_000), np.random.default_rng(0).bytes(500)):
            assert samples_of(whole + tail, tmp_path / "a.wav") == 3 * RATE - odd
    unpadded = wav(noise(3), odd=True).replace(b"\0LIST", b"LIST") + chunk(b"id3 ", bytes([7]) * 50_000)
    assert samples_of(unpadded, tmp_path / "b.wav") == 3 * RATE - 1


def test_the_length_of_rf64_is_that_of_its_ds64_chunk(tmp_path: Path) -> None:
    """Any length in the header of the data chunk: libsndfile ignores it."""
    whole = encoded("rf64", noise(3))
    place = whole.index(b"data") + 4
    for length in (0, 4, 0xFFFFFFFF, 6 * RATE):
        content = whole[:place] + struct.pack("<I", length) + whole[place + 4 :]
        assert samples_of(content, tmp_path / "a.rf64") == 3 * RATE
        with pytest.raises(UserError, match="truncated"):
            read_audio(io.BytesIO(content[:-RATE]), SETTINGS)


def headless_mp3(seconds: int, mode: str) -> tuple[bytes, int]:
    """MP3 with a nearly silent first half and without the frame with its length; and its number of samples."""
    waveform = noise(seconds)
    waveform[: len(waveform) // 2] *= 1e-4
    file = io.BytesIO()
    with soundfile.SoundFile(
        file, "w", RATE, 1, "MPEG_LAYER_III", format="MP3", bitrate_mode=mode, compression_level=0.5
    ) as out:
        out.write(waveform)
    content = file.getvalue()
    return content[content.index(content[:2], 4) :], len(waveform)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE", "AVERAGE"])
def test_mp3_of_any_bit_rate_without_a_header_is_read_to_its_end(mode: str, tmp_path: Path) -> None:
    """The length is estimated from the bit rate of the first frames, which are silence here."""
    content, samples = headless_mp3(60, mode)
    for tagged in (content, ID3 + content + ID3V1):
        assert 0 <= samples_of(tagged, tmp_path / "a.mp3") - samples < 3 * 1152
    whole = read_audio(tmp_path / "a.mp3", SETTINGS)
    segment = torch.cat(list(audio_blocks(tmp_path / "a.mp3", SETTINGS, None, 50.0, 5.0)))
    assert torch.allclose(segment, whole[50 * RATE : 55 * RATE], atol=1e-5)
    for start, duration in ((70.0, 1.0), (59.0, 3.0)):
        with pytest.raises(UserError, match="ends before the segment's"):
            FileSource(Recording("a"), tmp_path / "a.mp3", start, duration).load(SETTINGS)


def test_a_long_compressed_file_that_lacks_some_seconds_gives_a_warning(tmp_path: Path) -> None:
    """One per cent of an hour is 36 seconds."""
    whole = encoded("mp3", noise(600))
    assert samples_of(whole, tmp_path / "a.mp3") == 600 * RATE
    assert "of 9600000 samples could be read" in warning_of(whole[: -len(whole) // 150], tmp_path / "a.mp3")
    with pytest.raises(UserError, match="truncated"):
        read_audio(write(tmp_path / "a.mp3", whole[: -len(whole) // 50]), SETTINGS)


def test_the_extent_of_a_file_is_read_once_for_all_its_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / f"{number}.flac", encoded("flac", noise(1))) for number in range(100)]
    measured: list[str] = []
    original = audio_open.read_extent
    monkeypatch.setattr(audio_open, "read_extent", lambda file: measured.append(file.name) or original(file))
    for start in (0.0, 0.3, 0.6):
        for path in paths:
            FileSource(Recording("a"), path, start, 0.2).load(SETTINGS)
    assert measured == list(map(str, paths))


# Resource forks of macOS next to files


@pytest.mark.parametrize("kind", sorted(FORMATS))
@pytest.mark.parametrize("fork", [b"", b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4072), b"junk" * 99])
def test_a_file_is_read_despite_a_macos_resource_fork_next_to_it(fork: bytes, kind: str, tmp_path: Path) -> None:
    """libsndfile treats `._X` as the resource fork of X, and X as a file of Sound Designer II."""
    path = write(tmp_path / f"a.{kind}", encoded(kind, noise(1)))
    write(tmp_path / f"._a.{kind}", fork)
    assert len(read_audio(path, SETTINGS)) >= RATE and audio_seconds(path) >= 1
    for start in (0.0, 0.5):
        assert len(FileSource(Recording("a"), path, start, 0.5).load(SETTINGS).waveform) == RATE // 2


def test_a_format_identified_only_by_its_suffix_is_still_read(tmp_path: Path) -> None:
    content = bytes(3000) + encoded("mp3", noise(1))
    assert len(read_audio(write(tmp_path / "a.mp3", content), SETTINGS)) == RATE
