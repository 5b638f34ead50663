"""Layout of long-context-asr: unchanged stored spectrograms with their settings; no code from a file."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from fuzzed import damaged, damaged_json
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import parse as parse_settings
from common.errors import UserError
from data.corpora.base import FeatureUtterance, Unreadable
from data.corpora.espeak import Synthesizer
from data.corpora.long_context_asr import (
    LongContextAsrSettings,
    read_spectrogram,
    sources,
    spectrogram_features,
)
from data.features import FeatureSettings
from data.prepare.extraction import Extracted, extract
from data.skipped import Skipped
from data.transcripts import Word

FUZZ = settings(max_examples=300, deadline=None, database=None)
GOOGLE = {
    "results": [
        {"alternatives": [{"transcript": "she sells", "confidence": 0.9, "words": []}]},
        {
            "alternatives": [
                {
                    "words": [
                        {"startTime": "0s", "endTime": "0.300s", "word": "She", "speakerTag": 1},
                        {"startTime": "0.300s", "endTime": "0.700s", "word": "sells,", "speakerTag": 2},
                    ]
                }
            ]
        },
    ]
}


def saved(tensor: object, **more: bool) -> bytes:
    file = io.BytesIO()
    torch.save(tensor, file, **more)  # as the corpus was written
    return file.getvalue()


def published_spectrogram(left: np.ndarray) -> torch.Tensor:
    """float16 [1, 80, T] from float32 [samples] at 16 kHz, by the published recipe of the corpus."""
    mel = torchaudio.transforms.MelSpectrogram(16000, n_fft=512, win_length=400, hop_length=160, n_mels=80)
    power = mel(torch.from_numpy(left)[None])
    return ((power - power.mean(-1, keepdim=True)) / power.std(-1, keepdim=True)).half()


@pytest.fixture(scope="module")
def left() -> np.ndarray:
    with Synthesizer("en-us") as voice:
        audio, _ = voice.speak(["she", "sells"])
        rate = voice.sample_rate
    at = np.arange(16000) / 16000 * rate
    noise = np.random.default_rng(0).normal(scale=1e-3, size=16000)
    return (np.interp(at, np.arange(len(audio)), audio) + noise).astype(np.float32)


@pytest.fixture
def tree(tmp_path: Path, left: np.ndarray) -> Path:
    """audio_txt_pairs.json, and shows/a.{ogg,spec.pt,json}; the right channel of the ogg is noise."""
    (tmp_path / "shows").mkdir()
    right = np.random.default_rng(1).uniform(-0.5, 0.5, len(left))
    soundfile.write(tmp_path / "shows/a.ogg", np.stack([left, right], axis=1), 16000)
    (tmp_path / "shows/a.spec.pt").write_bytes(saved(published_spectrogram(left)))
    (tmp_path / "shows/a.json").write_text(json.dumps(GOOGLE))
    pairs = {"show-1": {"audio": "shows/a.ogg", "txt": "shows/a.json", "duration": 1.0}}
    (tmp_path / "audio_txt_pairs.json").write_text(json.dumps(pairs))
    return tmp_path


def single_source(tree: Path, **more: object):
    (source,) = sources(LongContextAsrSettings(pairs=str(tree), **more))  # type: ignore[arg-type]
    return source


def test_the_stored_spectrogram_is_not_changed(tree: Path, left: np.ndarray) -> None:
    found = extract(single_source(tree), spectrogram_features())
    assert isinstance(found, Extracted)
    assert found.log_mel.dtype == np.float16
    assert np.array_equal(found.log_mel, published_spectrogram(left)[0].T.numpy())
    recording = found.recording
    assert (recording.id, recording.text, recording.language, recording.split) == (
        "show-1",
        "She sells,",
        "en",
        "train",
    )
    assert recording.words == [Word("She", 0.0, 0.3), Word("sells,", 0.3, 0.7)]


def test_the_settings_of_stored_spectrograms_reproduce_them_from_audio(tree: Path, left: np.ndarray) -> None:
    """A model trained on the spectrograms can then be evaluated on any audio."""
    soundfile.write(tree / "shows/a.ogg", np.stack([left, left[::-1]], axis=1), 16000, format="WAV", subtype="FLOAT")
    found = extract(single_source(tree, read="audio"), spectrogram_features())
    assert isinstance(found, Extracted)
    stored = published_spectrogram(left)[0].T.float().numpy()
    assert np.abs(found.log_mel - stored).max() < 0.02 and np.abs(stored).max() > 3
    assert found.recording.words == [Word("She", 0.0, 0.3), Word("sells,", 0.3, 0.7)]


def test_the_audio_of_the_layout_is_read_with_default_features(tree: Path) -> None:
    utterance = single_source(tree, read="audio", text="none").load(FeatureSettings())
    assert not isinstance(utterance, FeatureUtterance)
    assert len(utterance.waveform) == 16000 and utterance.recording.words is None


def test_features_other_than_the_stored_ones_are_refused_by_name(tree: Path) -> None:
    found = extract(single_source(tree), FeatureSettings())
    assert isinstance(found, Skipped)
    for part in ("a.spec.pt", "low_hz: 20.0 != 0.0", "logarithm: True != False", "channels: 'mean' != 'first'"):
        assert part in found.reason
    assert "--read audio" in found.reason


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (torch.zeros(1, 80, 101), r"torch\.float32 \[1, 80, 101\], expected a tensor of float16|FloatStorage"),
        (torch.zeros(80, 101).half(), r"\[80, 101\], expected \[1, 80, T\]"),
        (torch.zeros(1, 64, 101).half(), r"\[1, 64, 101\], expected \[1, 80, T\]"),
        (torch.zeros(1, 80, 0).half(), r"\[1, 80, 0\], expected"),
        (torch.zeros(1, 80, 302).half(), r"\[1, 80, 302\], expected .* 1 <= T <= 300"),
        (torch.full((1, 80, 101), float("nan")).half(), "NaN or infinite"),
        (torch.full((1, 80, 101), float("inf")).half(), "NaN or infinite"),
        (torch.zeros(1, 1, 1).half().expand(1, 80, 1 << 40), r"expected \[1, 80, T\]"),
        ({"spectrogram": torch.zeros(1, 80, 101).half()}, "holds dict, expected a tensor"),
        ([torch.zeros(1).half(), torch.zeros(2).half()], "holds 2 storages"),
        ("text", "holds 0 storages"),
    ],
)
def test_files_with_other_content_than_a_spectrogram_are_named(tmp_path: Path, value: object, complaint: str) -> None:
    path = tmp_path / "x.spec.pt"
    path.write_bytes(saved(value))
    with pytest.raises(UserError, match=rf"x\.spec\.pt: .*({complaint})"):
        read_spectrogram(path, 1.0)


def test_a_file_larger_than_its_recording_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.spec.pt"
    path.write_bytes(saved(torch.zeros(1, 80, 100_000).half()))
    with pytest.raises(UserError, match=r"x\.spec\.pt: larger than the \d+ bytes"):
        read_spectrogram(path, 1.0)
    assert read_spectrogram(path, 1000.0).shape == (100_000, 80)


def test_the_old_format_of_torch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.spec.pt"
    path.write_bytes(saved(torch.zeros(1, 80, 101).half(), _use_new_zipfile_serialization=False))
    with pytest.raises(UserError, match=r"x\.spec\.pt: not an archive of torch\.save"):
        read_spectrogram(path, 1.0)


def rewritten(content: bytes, changes: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    """Copy of the archive with other content in the records with this ending."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", compress) as new:
        for record in old.infolist():
            name = record.filename.split("/", 1)[1]
            new.writestr(record.filename, changes.get(name, old.read(record)))
    return file.getvalue()


class Hostile:
    """Object that runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "x.spec.pt", tmp_path / "it-ran"
    good = saved(torch.zeros(1, 80, 101).half())
    for protocol in (0, 2, 4):
        path.write_bytes(rewritten(good, {"data.pkl": pickle.dumps(Hostile(trace), protocol)}))
        with pytest.raises(UserError, match=r"x\.spec\.pt: its pickle imports .*refused"):
            read_spectrogram(path, 1.0)
        path.write_bytes(pickle.dumps(Hostile(trace), protocol))
        with pytest.raises(UserError, match=r"x\.spec\.pt: not an archive"):
            read_spectrogram(path, 1.0)
    # torch considers bytearray safe, but a terabyte of it is not.
    path.write_bytes(rewritten(good, {"data.pkl": b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\1\x85R."}))
    with pytest.raises(UserError, match="bytearray"):
        read_spectrogram(path, 1.0)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()  # without the checks it runs


def test_an_archive_that_expands_or_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.spec.pt"
    good = saved(torch.zeros(1, 80, 101).half())
    path.write_bytes(rewritten(good, {}, zipfile.ZIP_DEFLATED))
    with pytest.raises(UserError, match="a compressed record"):
        read_spectrogram(path, 1.0)
    for held in (100, 16159, 16200):
        path.write_bytes(rewritten(good, {"data/0": b"\0" * held}))
        with pytest.raises(UserError, match=r"x\.spec\.pt: torch cannot read it"):
            read_spectrogram(path, 1.0)


@pytest.mark.parametrize(
    ("pairs", "complaint"),
    [
        ([], "expected an object of recordings"),
        ({}, "expected an object of recordings"),
        ({"a": 3}, "'a': 3 is not an object"),
        ({"a": {"audio": "shows/a.ogg", "txt": "shows/a.json"}}, "'a': no 'duration'"),
        ({"a": {"audio": "shows/a.ogg", "txt": "shows/a.json", "duration": "1"}}, "duration is '1', expected seconds"),
        ({"a": {"txt": "shows/a.json", "duration": 1}}, "'a': no 'audio'"),
        ({"a": {"audio": "shows/a.ogg", "duration": 1}}, "'a': no 'txt'.*--text none"),
        ({"a": {"audio": "shows/b.ogg", "txt": "x.json", "duration": 1}}, r"2 of 2 files .*shows/b\.spec\.pt.*x\.json"),
        ({"\ta": {"audio": "shows/a.ogg", "txt": "shows/a.json", "duration": 1}}, r"'\\ta' has the control character"),
    ],
)
def test_a_bad_entry_is_named(tree: Path, pairs: object, complaint: str) -> None:
    (tree / "audio_txt_pairs.json").write_text(json.dumps(pairs))
    with pytest.raises(UserError, match=rf"audio_txt_pairs\.json.*{complaint}"):
        single_source(tree)


@pytest.mark.parametrize("read", ["spectrogram", "audio"])
def test_an_unreadable_entry_is_skipped(tree: Path, read: str) -> None:
    good = {"audio": "shows/a.ogg", "txt": "shows/a.json", "duration": 1.0}
    pairs = {"a": good, "b\u3000c": good, "d\n": good, "e": {**good, "duration": "1"}, "f": good}
    (tree / "audio_txt_pairs.json").write_text(json.dumps(pairs))
    found = sources(LongContextAsrSettings(pairs=str(tree), read=read))  # type: ignore[arg-type]
    bad = [source.reason for source in found if isinstance(source, Unreadable)]
    assert [source.id for source in found if not isinstance(source, Unreadable)] == ["a", "b\u3000c", "f"]
    assert "has the control character" in bad[0] and "'e': duration is '1'" in bad[1] and len(bad) == 2


def test_bad_words_and_settings_are_named(tree: Path) -> None:
    (tree / "shows/a.json").write_text('{"results": 1}')
    with pytest.raises(UserError, match=r"a\.json: no list 'results'"):
        single_source(tree).load(spectrogram_features())
    with pytest.raises(UserError, match="pairs is empty"):
        sources(LongContextAsrSettings())
    with pytest.raises(UserError, match="read is 'spec'"):
        parse_settings(LongContextAsrSettings, ["--read=spec"])


def check_spectrogram_or_error(path: Path) -> None:
    """Read a possibly damaged file of three frames: finite values, or an error that names the file."""
    try:
        values = read_spectrogram(path, 0.03)
    except UserError as error:
        assert str(error).startswith(str(path))
        return
    assert values.dtype == torch.float16 and values.shape[1] == 80 and torch.isfinite(values).all()


@FUZZ
@given(st.data())
def test_a_damaged_spectrogram_gives_finite_numbers_or_one_error_with_its_place(data: st.DataObject) -> None:
    path = damaged(data, saved(torch.zeros(1, 80, 3).half()), "fuzzed.spec.pt")
    check_spectrogram_or_error(path)


@FUZZ
@given(data=st.data())
def test_a_damaged_pickle_gives_finite_numbers_or_one_error_with_its_place(data: st.DataObject) -> None:
    good = saved(torch.zeros(1, 80, 3).half())
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = damaged(data, archive.read(name), "fuzzed.pkl").read_bytes()
    path = damaged(data, rewritten(good, {"data.pkl": pickled}), "fuzzed.spec.pt", 0)
    check_spectrogram_or_error(path)


@FUZZ
@given(data=st.data())
def test_damaged_pairs_give_recordings_or_one_error_with_its_place(data: st.DataObject) -> None:
    good = {"a": {"audio": __file__, "txt": __file__, "duration": 1.0}, "b": {"audio": "x", "txt": "y", "duration": 2}}
    parts = data.draw(st.booleans())  # of the JSON, or any bytes
    content = json.dumps(damaged_json(data, good) if parts else good).encode()
    path = damaged(data, content, "fuzzed-pairs.json", 0 if parts else 4)
    try:
        found = sources(LongContextAsrSettings(pairs=str(path), read="audio"))
    except UserError as error:
        assert str(error).startswith(str(path))
        return
    assert all(source.id.isprintable() for source in found)
