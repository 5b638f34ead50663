"""Audio to log-mel: the numbers, their length, what is refused."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from data.errors import DataError
from data.features import BLOCK_FRAMES, READ_SECONDS, FeatureSettings, LogMel, difference, read_audio, resample

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
def test_audio_with_a_bad_sample_is_refused(bad: float, tmp_path: Path) -> None:
    waveform = tone(16_000, 1)
    waveform[8_000] = bad
    with pytest.raises(DataError, match="NaN"):
        LogMel(SETTINGS)(waveform)
    soundfile.write(tmp_path / "bad.wav", waveform, 16_000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"bad\.wav.*NaN"):
        read_audio(tmp_path / "bad.wav", SETTINGS)


def test_audio_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="too short"):
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


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_resampling_in_blocks_equals_one_pass(rate: int) -> None:
    waveform = np.random.default_rng(0).normal(size=rate * (2 * READ_SECONDS + 1) + 77).astype(np.float32)
    size = READ_SECONDS * rate
    blocks = [waveform[i : i + size] for i in range(0, len(waveform), size)]
    in_blocks = resample(blocks, rate, 16_000)
    one_pass = torchaudio.transforms.Resample(rate, 16_000)(torch.from_numpy(waveform))
    assert in_blocks.shape == one_pass.shape
    torch.testing.assert_close(in_blocks, one_pass, rtol=0, atol=1e-5)


def test_an_open_file_is_read_and_named_in_errors() -> None:
    file = io.BytesIO()
    soundfile.write(file, tone(16_000, 1), 16_000, format="FLAC")
    file.seek(0)
    assert len(read_audio(file, SETTINGS)) == 16_000
    with pytest.raises(DataError, match="row 7 of a table"):
        read_audio(io.BytesIO(b"no audio"), SETTINGS, name="row 7 of a table")


@pytest.mark.parametrize("kind", ["missing", "zero bytes", "no samples", "garbage", "cut short"])
@pytest.mark.parametrize("suffix", ["flac", "wav", "mp3"])
def test_an_unusable_file_is_named(kind: str, suffix: str, tmp_path: Path) -> None:
    if (kind, suffix) == ("cut short", "wav"):
        pytest.skip("libsndfile takes a WAV file that is cut short for a shorter one")
    path = tmp_path / f"this.{suffix}"
    if kind == "zero bytes":
        path.touch()
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), 16_000)
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5_000))
    elif kind == "cut short":
        soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 64_000), 16_000)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"this\.{suffix}"):
        read_audio(path, SETTINGS)


def test_hash_covers_every_field_and_no_spelling() -> None:
    changed: dict[str, float | str] = {"sample_rate": 20_000, "num_mels": 64, "window_ms": 20.0, "hop_ms": 20.0}
    changed |= {"n_fft": 1024, "low_hz": 0.0, "high_hz": 7600.0, "mel_scale": "slaney", "log_floor": 1e-5}
    assert set(changed) == {f.name for f in dataclasses.fields(FeatureSettings)} - {"channels"}
    others = [dataclasses.replace(SETTINGS, **{name: value}) for name, value in changed.items()]
    assert len({SETTINGS.hash(), *(other.hash() for other in others)}) == 1 + len(changed)
    assert FeatureSettings(window_ms=25).hash() == SETTINGS.hash()
    assert FeatureSettings.from_dict(SETTINGS.to_dict()) == SETTINGS
    for name, other in zip(changed, others, strict=True):
        assert difference(SETTINGS, other) == [f"{name}: {getattr(SETTINGS, name)!r} != {changed[name]!r}"]


@pytest.mark.parametrize(
    ("field", "value"), [("n_fft", 256), ("high_hz", 9000.0), ("hop_ms", 0.03), ("log_floor", 0.0), ("num_mels", 0)]
)
def test_a_setting_that_cannot_be_is_named(field: str, value: float) -> None:
    with pytest.raises(DataError, match=rf"features\.{field} is {value}"):
        dataclasses.replace(SETTINGS, **{field: value})


def test_settings_with_an_unknown_field_are_refused() -> None:
    with pytest.raises(DataError, match="dither"):
        FeatureSettings.from_dict(SETTINGS.to_dict() | {"dither": 1.0})
