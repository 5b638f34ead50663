"""Log-mel features: values, length, invalid input."""

from __future__ import annotations

import dataclasses
import io
import resource
import struct
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import strategies as st

from common.errors import UserError
from data.audio.reading import READ_SECONDS, resample
from data.corpora.audio_files import FileSource
from data.features import FeatureSettings, difference
from data.log_mel import BLOCK_FRAMES, LogMel
from data.prepare.extraction import Extracted, extract
from data.recording import Recording
from tests.decoded_audio import read_audio
from tests.paths import REPOSITORY

SETTINGS = FeatureSettings()


def tone(rate: int, seconds: float, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("samples", [400, 16_000, 16_159, 16_160, 100_000])
def test_log_mel_equals_torchaudios_mel_spectrogram(samples: int) -> None:
    waveform = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    mel = torchaudio.transforms.MelSpectrogram(16_000, 512, 400, 160, 20.0, 8000.0, n_mels=80)(waveform)
    log_mel = LogMel(SETTINGS)(waveform)
    assert log_mel.shape == (1 + samples // 160, 80)
    torch.testing.assert_close(log_mel, mel.T.clamp(min=SETTINGS.log_floor).log(), rtol=0, atol=1e-4)


def test_frames_of_a_long_recording_do_not_depend_on_what_follows() -> None:
    waveform = 0.1 * torch.randn(16_000 * 20, generator=torch.Generator().manual_seed(0))
    whole = LogMel(SETTINGS)(waveform)
    frames = 3 * BLOCK_FRAMES
    part = LogMel(SETTINGS)(waveform[: frames * 160 + 400])
    assert torch.equal(part[:frames], whole[:frames])


def test_silence_is_finite_and_at_the_floor() -> None:
    log_mel = LogMel(SETTINGS)(torch.zeros(16_000))
    assert torch.equal(log_mel, torch.full_like(log_mel, float(np.log(np.float32(1e-6)))))


def test_float16_keeps_log_mel_to_a_hundredth() -> None:
    rng = np.random.default_rng(0)
    loud_and_quiet = rng.normal(size=80_000) * np.repeat([1.0, 0.1, 1e-3, 1e-5], 20_000)
    log_mel = LogMel(SETTINGS)(loud_and_quiet.astype(np.float32))
    error = (log_mel - log_mel.half().float()).abs()
    assert error.max() <= 0.004 and error.square().mean().sqrt() <= 0.002


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_audio_with_a_non_finite_sample_is_refused(bad: float, tmp_path: Path) -> None:
    waveform = tone(16_000, 1)
    waveform[8_000] = bad
    with pytest.raises(UserError, match="NaN"):
        LogMel(SETTINGS)(waveform)
    soundfile.write(tmp_path / "bad.wav", waveform, 16_000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"bad\.wav.*NaN"):
        read_audio(tmp_path / "bad.wav", SETTINGS)


def test_audio_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match="too short"):
        LogMel(SETTINGS)(torch.zeros(399))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_stereo_at_any_rate_becomes_the_mean_of_its_channels_at_16_khz(rate: int, tmp_path: Path) -> None:
    left, right = tone(rate, 2.0, 440), tone(rate, 2.0, 1000)
    soundfile.write(tmp_path / "a.flac", np.stack([left, right], 1), rate)
    waveform = read_audio(tmp_path / "a.flac", SETTINGS)
    assert waveform.dtype == torch.float32 and waveform.shape == (32_000,)
    expected = (tone(16_000, 2.0, 440) + tone(16_000, 2.0, 1000)) / 2
    middle = slice(1_000, -1_000)
    assert np.abs(waveform.numpy() - expected)[middle].max() < 0.01


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def in_pieces(waveform: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """Split at random into blocks of 1 sample to ten seconds."""
    lengths = np.exp(np.random.default_rng(seed).uniform(0, np.log(160_000), 2000)).astype(int)
    cuts = [int(cut) for cut in np.cumsum(lengths) if cut < len(waveform)]
    return list(torch.tensor_split(waveform, cuts))


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_resampling_in_blocks_equals_one_pass(rate: int) -> None:
    waveform = noise(rate * (2 * READ_SECONDS + 1) + 77)
    in_blocks = resample([waveform], rate, 16_000)
    one_pass = torchaudio.transforms.Resample(rate, 16_000)(waveform)
    assert in_blocks.shape == one_pass.shape
    torch.testing.assert_close(in_blocks, one_pass, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
@pytest.mark.parametrize("extra", [-1, 0, 1, 700, 44_100])
def test_resampled_samples_do_not_depend_on_the_blocks(rate: int, extra: int) -> None:
    """Bit-identical, also with the end just before, at and after the end of a block and its context."""
    waveform = noise(rate * READ_SECONDS + extra)
    assert torch.equal(resample(in_pieces(waveform), rate, 16_000), resample([waveform], rate, 16_000))


@pytest.mark.parametrize("samples", [400, 1000, 127 * 160 + 512, 128 * 160, 128 * 160 + 1, 700_001])
@pytest.mark.parametrize("settings", [SETTINGS, FeatureSettings(hop_ms=40.0, window_ms=30.0)], ids=["usual", "gaps"])
def test_frames_of_audio_in_blocks_are_bit_identical_to_one_pass(samples: int, settings: FeatureSettings) -> None:
    waveform, log_mel = noise(max(samples, settings.window)), LogMel(settings)
    whole = log_mel(waveform)
    assert torch.equal(torch.cat(list(log_mel.blocks(in_pieces(waveform)))), whole)
    # Single samples, and a first block that ends with the window of the 128th frame.
    first = (BLOCK_FRAMES - 1) * settings.hop + settings.n_fft // 2
    for blocks in ([*waveform[:999].split(1), waveform[999:]], [waveform[:first], waveform[first:]]):
        assert torch.equal(torch.cat(list(log_mel.blocks(blocks))), whole)


@pytest.mark.parametrize("suffix", ["flac", "wav", "mp3", "ogg", "opus", "sph"])
def test_a_long_stereo_file_read_in_blocks_gives_the_frames_of_one_pass(suffix: str, tmp_path: Path) -> None:
    path, rate = tmp_path / f"a.{suffix}", 48_000
    format, subtype = {"opus": ("OGG", "OPUS"), "sph": ("NIST", "PCM_16")}.get(suffix, (suffix.upper(), None))
    soundfile.write(path, noise(2 * rate * 25).view(-1, 2).numpy(), rate, subtype, format=format)
    samples, _ = soundfile.read(path, dtype="float32")
    one_pass = LogMel(SETTINGS)(resample([np.ascontiguousarray(samples).mean(axis=1)], rate, 16_000))
    utterance = FileSource(Recording("a"), path).load(SETTINGS)
    assert not isinstance(utterance.audio, torch.Tensor)  # not in memory as a whole
    assert torch.equal(torch.cat(list(LogMel(SETTINGS).blocks(utterance.audio))), one_pass)
    result = extract(FileSource(Recording("a"), path), SETTINGS)
    assert isinstance(result, Extracted) and np.array_equal(result.log_mel, one_pass.half().numpy())


def test_a_segment_of_a_file_equals_that_part_of_the_whole(tmp_path: Path) -> None:
    samples = noise(16_000 * 30)
    soundfile.write(tmp_path / "a.wav", samples.numpy(), 16_000, "FLOAT")
    for start, duration in ((0.0, 30.0), (1.5, 12.0), (29.0, 1.0), (3.0, 0.25)):
        heard = FileSource(Recording("a"), tmp_path / "a.wav", start, duration).load(SETTINGS).waveform
        assert torch.equal(heard, samples[int(start * 16_000) : int((start + duration) * 16_000)])
    for start, duration in ((29.0, 1.5), (31.0, 1.0), (3.0, 0.0)):
        with pytest.raises(UserError, match=r"a\.wav"):
            FileSource(Recording("a"), tmp_path / "a.wav", start, duration).load(SETTINGS)


def test_three_hours_of_48_khz_stereo_need_little_more_memory_than_their_features(tmp_path: Path) -> None:
    """The file is sparse: noise at its start, then silence."""
    path, seconds, rate = tmp_path / "long.wav", 3 * 3600, 48_000
    soundfile.write(path, noise(2 * rate * 10).view(-1, 2).numpy(), rate, "PCM_16")
    size = 4 * rate * seconds
    with open(path, "r+b") as file:
        header = file.read(44)
        assert header[36:40] == b"data"
        file.seek(0)
        file.write(header[:4] + struct.pack("<I", size + 36) + header[8:40] + struct.pack("<I", size))
        file.truncate(44 + size)
    program = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from data.corpora.audio_files import FileSource\n"
        "from data.prepare.extraction import extract\n"
        "from data.features import FeatureSettings\n"
        "from data.recording import Recording\n"
        "from data.format.writer import DatasetWriter\n"
        "torch.set_num_threads(1)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "writer = DatasetWriter(sys.argv[2], FeatureSettings())\n"
        "before = peak()\n"
        "result = extract(FileSource(Recording('long'), Path(sys.argv[1])), FeatureSettings())\n"
        "writer.add(result.recording, result.log_mel)\n"
        "print(len(result.log_mel), (peak() - before) * 1024 - result.log_mel.nbytes)\n"
    )
    program = [sys.executable, "-c", program, str(path), str(tmp_path / "out")]
    ended = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    frames, more = map(int, ended.stdout.split())
    assert frames == 1 + 100 * seconds
    assert more < 150e6, f"{more / 1e6:.0f} MB in addition to the features"


SEEDS = {}
for _name, (_format, _subtype) in {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", None),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "sph": ("NIST", "PCM_16"),
}.items():
    _file = io.BytesIO()
    soundfile.write(_file, tone(16_000, 0.3), 16_000, _subtype, format=_format)
    SEEDS[_name] = _file.getvalue()


@hypothesis.given(st.sampled_from(sorted(SEEDS)), st.data())
@hypothesis.settings(max_examples=300, deadline=None)
def test_a_damaged_file_gives_audio_or_one_error_that_names_it(kind: str, data: st.DataObject) -> None:
    content = bytearray(SEEDS[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the changes are in the header, where errors are most dangerous.
        place = data.draw(st.integers(0, 80) | st.integers(0, 1 << 16)) % max(1, len(content))
        change = data.draw(st.sampled_from(["flip", "delete", "insert", "cut", "ones"]))
        if change == "flip":
            content[place : place + 1] = bytes([data.draw(st.integers(0, 255))])
        elif change == "delete":
            del content[place : place + data.draw(st.integers(1, 64))]
        elif change == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=16))
        elif change == "ones":
            content[place : place + 4] = b"\xff" * 4
        else:
            del content[place:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        waveform = read_audio(io.BytesIO(bytes(content)), SETTINGS, name="the file")
        assert torch.isfinite(waveform).all() and waveform.ndim == 1
    except UserError as error:
        assert str(error).startswith("the file: ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize("rate", [1, 999, 47_999, 2**31 - 1])
def test_a_sample_rate_that_would_fill_the_memory_is_refused(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16_000, 1), rate)
    with pytest.raises(UserError, match=rf"a\.wav: {rate} Hz cannot be resampled to 16000 Hz"):
        read_audio(tmp_path / "a.wav", SETTINGS)


def test_an_open_file_is_read_and_named_in_errors() -> None:
    file = io.BytesIO()
    soundfile.write(file, tone(16_000, 1), 16_000, format="FLAC")
    file.seek(0)
    assert len(read_audio(file, SETTINGS)) == 16_000
    with pytest.raises(UserError, match="row 7 of a table"):
        read_audio(io.BytesIO(b"no audio"), SETTINGS, name="row 7 of a table")


@pytest.mark.parametrize("kind", ["missing", "zero bytes", "no samples", "garbage", "truncated"])
@pytest.mark.parametrize("suffix", ["flac", "wav", "mp3"])
def test_an_unusable_file_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"this.{suffix}"
    if kind == "zero bytes":
        path.touch()
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), 16_000)
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5_000))
    elif kind == "truncated":
        soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 64_000), 16_000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"this\.{suffix}"):
        read_audio(path, SETTINGS)


def test_the_hash_covers_every_field_and_ignores_number_formats() -> None:
    changed: dict[str, float | str] = {"sample_rate": 20_000, "num_mels": 64, "window_ms": 20.0, "hop_ms": 20.0}
    changed |= {"n_fft": 1024, "low_hz": 0.0, "high_hz": 7600.0, "mel_scale": "slaney", "log_floor": 1e-5}
    changed |= {"channels": "first", "standardized": True}
    assert set(changed) == {f.name for f in dataclasses.fields(FeatureSettings)} - {"logarithm"}  # needs two
    others = [dataclasses.replace(SETTINGS, **{name: value}) for name, value in changed.items()]
    assert len({SETTINGS.hash(), *(other.hash() for other in others)}) == 1 + len(changed)
    assert FeatureSettings(window_ms=25).hash() == SETTINGS.hash()
    assert FeatureSettings.from_dict(SETTINGS.to_dict()) == SETTINGS
    for name, other in zip(changed, others, strict=True):
        assert difference(SETTINGS, other) == [f"{name}: {getattr(SETTINGS, name)!r} != {changed[name]!r}"]


@pytest.mark.parametrize(
    ("field", "value"), [("n_fft", 256), ("high_hz", 9000.0), ("hop_ms", 0.03), ("log_floor", 0.0), ("num_mels", 0)]
)
def test_an_invalid_setting_is_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"features\.{field} is {value}"):
        dataclasses.replace(SETTINGS, **{field: value})


def test_settings_with_an_unknown_field_are_refused() -> None:
    with pytest.raises(UserError, match="dither"):
        FeatureSettings.from_dict(SETTINGS.to_dict() | {"dither": 1.0})
