"""Faulty audio files: without a length, truncated, several streams, segments that end late, inverted channels."""

from __future__ import annotations

import io
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from common.errors import AudioWarning, UserError
from data.audio.files import AUDIO_SUFFIXES, list_audio
from data.audio.reading import audio_blocks, audio_seconds
from data.corpora.audio_files import FileSource
from data.features import FeatureSettings
from data.prepare.extraction import Extracted, extract, extract_all
from data.prepare.prepare import main
from data.recording import Recording
from data.skipped import Skipped
from tests.decoded_audio import read_audio

SETTINGS = FeatureSettings()
RATE = 16_000
ID3 = b"ID3\x04\0\0\0\0\x02\x05" + bytes(2 * 128 + 5)
ID3V1 = b"TAG" + bytes(125)
SEVERAL = "several streams"

# libsndfile's format and subtype for every supported suffix, and some more encodings.
FORMATS = {
    "aif": ("AIFF", "PCM_16"),
    "aiff": ("AIFF", "PCM_24"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", None),
    "oga": ("OGG", "VORBIS"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "rf64": ("RF64", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
    "ulaw.sph": ("NIST", "ULAW"),
    "w64": ("W64", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "wavex": ("WAVEX", "FLOAT"),
    "ulaw.wav": ("WAV", "ULAW"),
    "adpcm.wav": ("WAV", "IMA_ADPCM"),
    "alac.caf": ("CAF", "ALAC_16"),
    "s8.caf": ("CAF", "PCM_S8"),
}


def noise(seconds: float, channels: int = 1, seed: int = 0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).normal(size=(round(seconds * RATE), channels))).astype(np.float32)


def encoded(kind: str, waveform: NDArray[np.float32], rate: int = RATE, endian: str = "FILE") -> bytes:
    file = io.BytesIO()
    container, subtype = FORMATS[kind]
    soundfile.write(file, waveform, rate, subtype, endian, container)
    return file.getvalue()


def uncounted(flac: bytes) -> bytes:
    """FLAC without the number of samples in STREAMINFO, as written by streaming encoders."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_every_supported_suffix_is_in_the_test_table() -> None:
    assert {f".{kind}" for kind in FORMATS} >= set(AUDIO_SUFFIXES)


# FLAC without a sample count


@pytest.mark.parametrize("tag", [b"", ID3], ids=["plain", "ID3"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (48_000, 2)])
def test_flac_without_a_sample_count_decodes_to_the_same_samples(
    rate: int, channels: int, tag: bytes, tmp_path: Path
) -> None:
    flac = encoded("flac", noise(7.3365, channels), rate)
    counted, streamed = write(tmp_path / "a.flac", flac), write(tmp_path / "b.flac", tag + uncounted(flac))
    whole = read_audio(counted, SETTINGS)
    assert torch.equal(read_audio(streamed, SETTINGS), whole)
    assert torch.equal(read_audio(io.BytesIO(tag + uncounted(flac)), SETTINGS), whole)
    end = audio_seconds(counted)
    for start, duration in ((0.0, 1.0), (0.0, end), (0.7, 0.5), (end - 1, 1.0), (end - 1, 1.003)):
        for channel in (None, channels - 1):
            a, b = (FileSource(Recording("a"), path, start, duration, 0) for path in (counted, streamed))
            assert torch.equal(a.load(SETTINGS).waveform, b.load(SETTINGS).waveform)
            heard = torch.cat(list(audio_blocks(streamed, SETTINGS, None, start, duration, channel)))
            assert len(heard) > 6000
    for start, duration in ((end, 0.5), (end + 60, 1.0), (end - 1, 1.5)):
        with pytest.raises(UserError, match=r"b\.flac: ends before the segment's"):
            FileSource(Recording("a"), streamed, start, duration).load(SETTINGS)


def test_the_length_of_flac_without_a_sample_count_is_estimated(tmp_path: Path) -> None:
    write(tmp_path / "a.flac", uncounted(encoded("flac", noise(7.3365))))
    write(tmp_path / "b.flac", b"no audio")
    streamed, unreadable = list_audio(str(tmp_path), "key")
    assert 3 < streamed.seconds < 20 and unreadable.seconds == 0


def test_truncated_flac_without_a_sample_count_is_an_error(tmp_path: Path) -> None:
    flac = uncounted(encoded("flac", noise(3)))
    with pytest.raises(UserError, match=r"a\.flac"):
        read_audio(write(tmp_path / "a.flac", flac[: len(flac) // 2]), SETTINGS)


# Segments that end after the audio


@pytest.mark.parametrize("kind", ["wav", "flac", "opus", "sph"])
def test_a_segment_that_ends_within_the_tolerance_after_the_audio_is_shortened(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{kind}", encoded(kind, noise(7.3365)))
    samples = len(read_audio(path, SETTINGS))
    for over in (0.0035, 0.09):
        heard = FileSource(Recording("a"), path, 5.0, 2.3365 + over).load(SETTINGS).waveform
        assert len(heard) == samples - 5 * RATE
    for start, duration in ((5.0, 2.45), (7.34, 0.02), (9.0, 1.0)):
        result = extract(FileSource(Recording("a"), path, start, duration), SETTINGS)
        assert isinstance(result, Skipped) and f"a.{kind}: ends before the segment's" in result.reason


def lhotse_recording(path: Path) -> dict:
    source = {"type": "file", "channels": [0], "source": str(path)}
    fields = {"id": "r", "sources": [source], "sampling_rate": RATE, "num_samples": 117384, "duration": 7.3365}
    return fields | {"channel_ids": [0]}


def supervision(id: str, start: float, duration: float, **more: object) -> dict:
    fields = {"id": id, "recording_id": "r", "start": start, "duration": duration, "channel": 0, "text": "some words"}
    return {**fields, **more}


def nemo(folder: Path, audio: Path, stretches: list[tuple[float, float]]) -> list[str]:
    lines = [{"audio_filepath": audio.name, "offset": a, "duration": d, "text": "some words"} for a, d in stretches]
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["folder", "--manifest", str(folder / "m.jsonl")]


def lhotse_cuts(folder: Path, audio: Path, stretches: list[tuple[float, float]]) -> list[str]:
    lines = [
        {"id": f"c{a}", "type": "MonoCut", "start": a, "duration": d, "channel": 0,
         "supervisions": [supervision(f"s{a}", 0.0, d)], "recording": lhotse_recording(audio)}
        for a, d in stretches
    ]  # fmt: skip
    (folder / "cuts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["lhotse", "--cuts", str(folder / "cuts.jsonl")]


def lhotse_supervisions(folder: Path, audio: Path, stretches: list[tuple[float, float]]) -> list[str]:
    (folder / "r.jsonl").write_text(json.dumps(lhotse_recording(audio)) + "\n")
    lines = [supervision(f"s{a}", a, d) for a, d in stretches]
    (folder / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--recordings", str(folder / "r.jsonl"), "--supervisions", str(folder / "s.jsonl")]
    return ["lhotse", *given, "--unit", "supervisions"]


def tedlium(folder: Path, audio: Path, stretches: list[tuple[float, float]]) -> list[str]:
    for kind in ("sph", "stm"):
        (folder / "ted/train" / kind).mkdir(parents=True)
    (folder / "ted/train/sph/T.sph").write_bytes(audio.read_bytes())
    lines = [f"T 1 speaker {a} {a + d} <o,f0,male> some words\n" for a, d in stretches]
    (folder / "ted/train/stm/T.stm").write_text("".join(lines))
    return ["tedlium", "--folder", str(folder / "ted"), "--unit", "segments", "--splits", "train"]


@pytest.mark.parametrize("corpus", [nemo, lhotse_cuts, lhotse_supervisions, tedlium])
def test_every_corpus_shortens_a_segment_within_the_tolerance_and_skips_only_one_beyond_it(
    corpus: Callable[[Path, Path, list[tuple[float, float]]], list[str]], tmp_path: Path
) -> None:
    audio = write(tmp_path / "a.sph", encoded("sph", noise(7.3365)))
    stretches = [(0.0, 2.0), (2.0, 2.0), (5.0, 2.34), (5.5, 1.93), (6.0, 1.5), (7.6, 0.5), (8.0, 2.0)]
    out = tmp_path / "out"
    arguments = [*corpus(tmp_path, audio, stretches), "--out", str(out), "--workers", "1"]
    assert main([*arguments, "--max_skipped_share", "0.5"]) == 0
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert len(skipped) == 3 and all("ends before the segment's" in entry["reason"] for entry in skipped)
    assert json.loads((out / "dataset.json").read_text())["recordings"] == 4


def test_only_the_lhotse_recording_whose_supervision_ends_after_it_is_skipped(tmp_path: Path) -> None:
    audio = write(tmp_path / "a.wav", encoded("wav", noise(7.3365)))
    recordings = [lhotse_recording(audio) | {"id": id} for id in ("r", "within", "q", "s", "t")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in recordings))
    owned = [
        supervision("a", 5.0, 2.34, recording_id="within"),
        supervision("b", 5.0, 3.0),
        supervision("c", 1.0, 3.0, recording_id="q"),
        supervision("d", 8.0, 3.0, recording_id="q"),
        supervision("e", 1.0, 3.0, recording_id="s"),
        supervision("f", 1.0, 3.0, recording_id="t"),
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in owned))
    given = ["--recordings", str(tmp_path / "r.jsonl"), "--supervisions", str(tmp_path / "s.jsonl")]
    out = tmp_path / "out"
    assert main(["lhotse", *given, "--out", str(out), "--workers", "1"]) == 0
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(entry["id"].rpartition(": ")[2] for entry in skipped) == ["q", "r"]
    assert all("ends after its recording of 7.3365 s" in entry["reason"] for entry in skipped)


# Files with less audio than they declare


def cut(kind: str, content: bytes, share: float = 0.5) -> bytes:
    return content[: round(len(content) * share)]


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_a_truncated_file_is_an_error(kind: str, share: float, tmp_path: Path) -> None:
    whole = encoded(kind, noise(3))
    assert len(read_audio(write(tmp_path / f"whole.{kind}", whole), SETTINGS)) >= 3 * RATE
    path = write(tmp_path / f"this.{kind}", cut(kind, whole, share))
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(UserError, match=r"this"):
            read_audio(source, SETTINGS, "this")
    result = extract(FileSource(Recording("a"), path), SETTINGS)
    assert isinstance(result, Skipped) and result.id == "a"


@pytest.mark.parametrize("kind", ["wav", "w64", "aif", "au", "rf64", "sph"])
def test_a_long_file_may_lack_at_most_a_tenth_of_a_second(kind: str, tmp_path: Path) -> None:
    whole = encoded(kind, noise(60))
    lost = len(encoded(kind, noise(60))) - len(encoded(kind, noise(59.95)))
    assert len(read_audio(write(tmp_path / f"a.{kind}", whole[:-lost]), SETTINGS)) <= 60 * RATE
    with pytest.raises(UserError, match=r"truncated, has \d+ of about \d+ samples"):
        read_audio(write(tmp_path / f"b.{kind}", whole[: -4 * lost]), SETTINGS)


@pytest.mark.parametrize("kind", ["wav", "aif", "w64", "sph"])
def test_of_a_truncated_file_only_segments_before_the_end_are_read(kind: str, tmp_path: Path) -> None:
    whole = encoded(kind, noise(3))
    path = write(tmp_path / f"a.{kind}", cut(kind, whole))
    assert len(FileSource(Recording("a"), path, 0.2, 1.0).load(SETTINGS).waveform) == RATE
    with pytest.raises(UserError, match="ends before the segment's end"):
        FileSource(Recording("a"), path, 1.0, 1.5).load(SETTINGS)


def chunk(id: bytes, content: bytes) -> bytes:
    return id + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


def wav(waveform: NDArray[np.float32], *, data: int | None = None, size: int | None = None, odd: bool = False) -> bytes:
    """8-bit WAV with chunks of odd lengths around the audio; `data` and `size` replace the true lengths."""
    samples = (128 + 127 * waveform).astype(np.uint8).tobytes()[: -1 if odd else None]
    before = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, RATE, RATE, 1, 8)) + chunk(b"JUNK", b"odd")
    audio_chunk = chunk(b"data", samples)
    if data is not None:
        audio_chunk = b"data" + struct.pack("<I", data) + audio_chunk[8:]
    chunks = b"WAVE" + before + audio_chunk + (chunk(b"LIST", b"INFOIART\x05\0\0\0name\0\0") if data is None else b"")
    return b"RIFF" + struct.pack("<I", len(chunks) if size is None else size) + chunks


@pytest.mark.parametrize("odd", [False, True])
def test_chunks_around_the_audio_are_not_read_as_audio(odd: bool, tmp_path: Path) -> None:
    whole = wav(noise(3), odd=odd)
    assert len(read_audio(write(tmp_path / "a.wav", whole), SETTINGS)) == 3 * RATE - odd
    assert len(read_audio(write(tmp_path / "a.wav", whole[:-10]), SETTINGS)) == 3 * RATE - odd  # of the last chunk
    assert len(read_audio(write(tmp_path / "a.wav", ID3 + whole), SETTINGS)) == 3 * RATE - odd
    for content in (whole[: len(whole) // 2], ID3 + whole[: len(whole) // 2]):
        with pytest.raises(UserError, match="truncated, has 2[34][0-9]{3} of about 4[78][0-9]{3} samples"):
            read_audio(write(tmp_path / "a.wav", content), SETTINGS)


def test_truncation_of_big_endian_wav_and_au_is_detected(tmp_path: Path) -> None:
    for kind, endian in (("wav", "BIG"), ("au", "LITTLE"), ("caf", "LITTLE")):
        whole = encoded(kind, noise(3), endian=endian)
        assert len(read_audio(write(tmp_path / "a", whole), SETTINGS)) == 3 * RATE
        with pytest.raises(UserError):
            read_audio(write(tmp_path / "a", cut(kind, whole)), SETTINGS)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, 0x7FFFF000, 0x7F000000, 0x80000000])
def test_a_placeholder_length_written_to_a_pipe_is_not_a_truncation(length: int, tmp_path: Path) -> None:
    for size in (0, length):
        assert len(read_audio(write(tmp_path / "a.wav", wav(noise(3), data=length, size=size)), SETTINGS)) == 3 * RATE


def test_other_formats_with_a_placeholder_length_are_read(tmp_path: Path) -> None:
    au, aiff, w64 = (encoded(kind, noise(3)) for kind in ("au", "aif", "w64"))
    place = aiff.index(b"SSND") + 4
    opened = {
        "au": [au[:8] + b"\xff" * 4 + au[12:]],
        "aif": [aiff[:place] + struct.pack(">I", length) + aiff[place + 4 :] for length in (0, 0x7F000008)],
        "w64": [w64[:96] + struct.pack("<Q", length) + w64[104:] for length in (0, 0xFFFFFFFFFFFFFFFF)],
    }
    for kind, contents in opened.items():
        for content in contents:
            assert len(read_audio(write(tmp_path / f"a.{kind}", content), SETTINGS)) == 3 * RATE


def test_a_declared_length_that_includes_the_header_is_not_a_truncation(tmp_path: Path) -> None:
    """Written by some recorders: the length of the file instead of the audio."""
    samples = noise(0.5)
    content = wav(samples, data=len(samples) + 56)
    assert len(read_audio(write(tmp_path / "a.wav", content), SETTINGS)) == len(samples)


def test_zeros_after_the_header_are_not_searched_for_chunks(tmp_path: Path) -> None:
    """Zeros are not read as chunks; the file is sparse."""
    with open(write(tmp_path / "a.wav", wav(noise(0.5))), "r+b") as file:
        file.truncate(1 << 31)
    assert len(read_audio(tmp_path / "a.wav", SETTINGS)) == RATE // 2


# Several streams in one file


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_concatenated_files_are_an_error(kind: str, tmp_path: Path) -> None:
    first, second = encoded(kind, noise(3)), encoded(kind, noise(2, seed=1))
    for joined in (first + second, first + first):
        path = write(tmp_path / f"two.{kind}", joined)
        for source in (FileSource(Recording("a"), path), FileSource(Recording("a"), path, 0.5, 1.0)):
            with pytest.raises(UserError, match=rf"two\.{kind}: .*{SEVERAL}"):
                source.load(SETTINGS)
        with pytest.raises(UserError, match=SEVERAL):
            read_audio(io.BytesIO(joined), SETTINGS)


@pytest.mark.parametrize(("first", "second"), [("opus", "ogg"), ("ogg", "opus"), ("wav", "rf64")])
def test_concatenated_files_of_two_codecs_are_an_error(first: str, second: str, tmp_path: Path) -> None:
    joined = encoded(first, noise(3)) + encoded(second, noise(2, channels=2))
    with pytest.raises(UserError, match=SEVERAL):
        read_audio(write(tmp_path / f"two.{first}", joined), SETTINGS)


@pytest.mark.parametrize("kind", ["caf", "s8.caf", "ulaw.wav", "aif", "rf64"])
def test_concatenated_files_of_odd_lengths_are_an_error(kind: str, tmp_path: Path) -> None:
    """Any padding of the first file."""
    for samples in (24_001, 24_002, 24_003):
        whole = encoded(kind, noise(2)[:samples])
        assert len(read_audio(write(tmp_path / f"one.{kind}", whole), SETTINGS)) >= samples
        with pytest.raises(UserError, match=SEVERAL):
            read_audio(write(tmp_path / f"two.{kind}", whole + whole), SETTINGS)


def test_concatenated_files_with_tags_or_without_lengths_are_an_error(tmp_path: Path) -> None:
    flac, mp3 = encoded("flac", noise(2)), encoded("mp3", noise(2))
    for joined in (uncounted(flac) + uncounted(flac), ID3 + flac + ID3 + flac, ID3 + mp3 + ID3V1 + ID3 + mp3 + ID3V1):
        with pytest.raises(UserError, match=SEVERAL):
            read_audio(write(tmp_path / "two", joined), SETTINGS)


def test_mp3_without_a_length_header_is_read_to_the_end_of_the_file(tmp_path: Path) -> None:
    mp3 = encoded("mp3", noise(2))
    frames = mp3[mp3.index(mp3[:2], 4) :]  # without the frame with the length
    once = len(read_audio(write(tmp_path / "a.mp3", frames), SETTINGS))
    assert len(read_audio(write(tmp_path / "a.mp3", frames + frames), SETTINGS)) > 1.9 * once


@pytest.mark.parametrize("tail", [ID3V1, ID3, b"APETAGEX" + struct.pack("<IIQ8x", 2000, 40, 0) + bytes(40)])
def test_tags_after_mp3_are_not_a_second_file(tail: bytes, tmp_path: Path) -> None:
    mp3 = encoded("mp3", noise(2))
    whole = len(read_audio(write(tmp_path / "a.mp3", mp3), SETTINGS))
    assert len(read_audio(write(tmp_path / "a.mp3", ID3 + mp3 + tail), SETTINGS)) == whole


def test_an_ogg_file_without_its_last_page_is_read_with_a_warning(tmp_path: Path) -> None:
    """It may be truncated between two pages, or a recording of a live stream."""
    for kind in ("ogg", "opus"):
        whole = encoded(kind, noise(5))
        path = write(tmp_path / f"a.{kind}", whole[: whole.rindex(b"OggS")])
        result = extract(FileSource(Recording("a"), path), SETTINGS)
        assert isinstance(result, Extracted)
        (warning,) = result.warnings
        assert f"a.{kind}: the last Ogg page does not end the stream" in warning
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_audio(write(tmp_path / f"b.{kind}", whole), SETTINGS)


# Channels that cancel in their mean


def stereo(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([left, right], axis=1)


def warned(path: Path, settings: FeatureSettings = SETTINGS) -> tuple[str, ...]:
    result = extract(FileSource(Recording("a"), path), settings)
    assert isinstance(result, Extracted)
    return result.warnings


def test_cancelling_channels_give_a_warning_with_the_setting_that_helps(tmp_path: Path) -> None:
    waveform, other = noise(3), noise(3, seed=1)
    inverted = {
        "exactly": stereo(waveform, -waveform),
        "nearly": stereo(waveform, -0.8 * waveform + 0.05 * other),
        "with an offset": stereo(waveform + 0.2, -waveform + 0.2),
        "four": np.concatenate([waveform, -waveform, other, -other], axis=1),
    }
    for name, samples in inverted.items():
        for kind in ("wav", "flac"):
            path = write(tmp_path / f"{name}.{kind}", encoded(kind, samples, 44_100))
            (warning,) = warned(path)
            assert f"{name}.{kind}: the channels cancel (is one inverted?)" in warning, name
            assert "--features.channels first" in warning
            assert not warned(path, FeatureSettings(channels="first"))
            assert torch.isfinite(FileSource(Recording("a"), path, channel=0).load(SETTINGS).waveform).all()


def test_other_channels_give_no_warning(tmp_path: Path) -> None:
    waveform, other, silence = noise(3), noise(3, seed=1), np.zeros((3 * RATE, 1), np.float32)
    for samples in (
        waveform,
        stereo(waveform, waveform),
        stereo(waveform, other),
        stereo(waveform, silence),
        stereo(silence, silence),
        stereo(waveform, -0.5 * waveform + 0.5 * other),
        np.concatenate([waveform, *[silence] * 7], axis=1),
        noise(3, channels=8),
    ):
        assert not warned(write(tmp_path / "a.wav", encoded("wav", samples)))


def test_reading_a_file_alone_issues_the_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", encoded("wav", stereo(noise(1), -noise(1))))
    with pytest.warns(AudioWarning, match="cancel"):
        read_audio(path, SETTINGS)


def test_other_warnings_while_a_recording_is_loaded_are_shown(tmp_path: Path) -> None:
    class Deprecated(FileSource):
        def load(self, features: FeatureSettings):  # type: ignore[no-untyped-def]
            warnings.warn("an old function", RuntimeWarning, stacklevel=1)
            return super().load(features)

    path = write(tmp_path / "a.wav", encoded("wav", noise(1)))
    with pytest.warns(RuntimeWarning, match="an old function"):
        result = extract(Deprecated(Recording("a"), path), SETTINGS)
    assert isinstance(result, Extracted) and not result.warnings


def test_warnings_of_worker_processes_reach_the_result(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", encoded("wav", stereo(noise(1), -noise(1))))
    sources = [FileSource(Recording(str(number)), path) for number in range(3)]
    results = list(extract_all(sources, SETTINGS, 2))
    assert all(isinstance(result, Extracted) and "cancel" in result.warnings[0] for result in results)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Eight recordings; 02 and 05 have an inverted channel."""
    (tmp_path / "audio").mkdir()
    for number in range(8):
        samples = noise(1, seed=number)
        sign = -1 if number in (2, 5) else 1
        write(tmp_path / f"audio/{number:02}.wav", encoded("wav", stereo(samples, sign * samples)))
    return tmp_path / "audio"


def prepare(folder: Path, out: Path, *arguments: str) -> int:
    given = ["--folder", str(folder), "--text", "none", "--out", str(out), "--workers", "1"]
    return main(["folder", *given, *arguments])


def listed(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_warnings_of_a_preparation_are_counted_and_listed(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prepare(recordings, out) == 0
    assert listed(out / "warnings.jsonl") == ["02", "05"] and not (out / "skipped.jsonl").exists()
    printed = capsys.readouterr().out
    assert "8/8 recordings" in printed and "2 warnings" in printed and "2 like 02: " in printed
    assert json.loads((out / "dataset.json").read_text())["recordings"] == 8
    assert prepare(recordings, tmp_path / "first", "--features.channels", "first") == 0
    assert not (tmp_path / "first/warnings.jsonl").exists()
    assert " warnings" not in capsys.readouterr().out


def test_parts_and_interrupted_preparations_list_the_same_warnings(recordings: Path, tmp_path: Path) -> None:
    whole, parts, stopped = tmp_path / "whole", tmp_path / "parts", tmp_path / "stopped"
    assert prepare(recordings, whole) == 0
    for part in (0, 1):
        assert prepare(recordings, parts, f"--part={part}/2") == 0
    assert (parts / "warnings.jsonl").read_bytes() == (whole / "warnings.jsonl").read_bytes()
    assert not list(parts.glob("warnings-*"))
    broken = (recordings / "04.wav").read_bytes()
    (recordings / "04.wav").write_bytes(b"")
    # Every recording has its own shard, so those before 04 are done, including 02.
    assert prepare(recordings, stopped, "--shard_minutes=1e-9", "--max_skipped_share=0") == 2
    assert listed(stopped / "warnings.jsonl") == ["02"]
    (recordings / "04.wav").write_bytes(broken)
    assert prepare(recordings, stopped, "--shard_minutes=1e-9", "--max_skipped_share=0") == 0
    assert (stopped / "warnings.jsonl").read_bytes() == (whole / "warnings.jsonl").read_bytes()
