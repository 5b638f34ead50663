"""Unusual and invalid input to evaluate.py and transcribe.py: correct scores, or one error that names the cause."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

import evaluate as script
import transcribe
from bestrq.long_form.decoders import Decoder, DecoderSettings, GreedyCTC, decode_recordings
from bestrq.long_form.inference import InferenceSettings, Mode, RecordingSource
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import CTCModel
from bestrq.recognition.transducer import TransducerModel, TransducerSettings
from bestrq.training.export import write_export
from bestrq.training.export_reading import read_export
from bestrq.training.process import World
from common.config import run_main, to_dict
from common.errors import UserError
from data.corpora.audio_files import FileSource
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.format.writer import DatasetWriter
from data.prepare.extraction import Extracted, extract
from data.recording import Recording
from data.tokenizer import CharTokenizer
from pipelines.evaluation_settings import DataSettings
from pipelines.live_bytes import LiveBytes
from pipelines.recogniser import load_recogniser

LETTERS = CharTokenizer(list(" abcdefghijklmnopqrstuvwxyz"))
STREAMING = {"mask": "chunk", "chunk_size": 4, "left_chunks": 2, "causal_convolution": True}


def make_model(kind: str = "ctc", num_mels: int = 80, vocab_size: int = LETTERS.vocab_size) -> Any:
    """Tiny untrained model that can stream, with weights large enough for a hypothesis."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {"dim": 8, "num_layers": 1, "num_heads": 2, "feedforward_dim": 8, "kernel_size": 3}
    encoder = EncoderSettings(num_mels=num_mels, subsampling_channels=2, **shape, **STREAMING)
    model: CTCModel | TransducerModel
    if kind == "ctc":
        model = CTCModel(encoder, vocab_size)
        torch.nn.init.normal_(model.head.weight, std=3.0)
    else:
        model = TransducerModel(encoder, TransducerSettings(prediction_dim=6, joint_dim=6), vocab_size)
        torch.nn.init.normal_(model.joint.output.weight, std=3.0)
    return model.eval()


def make_export(folder: Path, kind: str = "ctc", **features: Any) -> str:
    """Export of such a model with changed feature settings."""
    settings = FeatureSettings(**features)
    model = make_model(kind, settings.num_mels)
    LETTERS.save(folder / "tokenizer")
    config = {
        "kind": kind, "encoder": to_dict(model.encoder.settings), "vocab_size": LETTERS.vocab_size,
        "features": settings.to_dict(), "feature_hash": settings.hash(), "normalisation": "recording",
    }  # fmt: skip
    if kind == "rnnt":
        config["transducer"] = to_dict(model.settings)
    files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    write_export(folder / "export", model.state_dict(), config, "a card", files)
    return str(folder / "export")


BAD_VALUES = [None, True, math.inf, 10**12, "x", [1], {"a": 1}]


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values of nested dicts, those of dicts included."""
    for name, value in values.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))


@pytest.mark.parametrize("kind", ["ctc", "rnnt"])
def test_wrong_values_in_an_export_are_user_errors_or_harmless(kind: str, tmp_path: Path) -> None:
    """Every value of config.json and tokenizer.json, replaced by two others; a model of any size is not built."""
    folder = Path(make_export(tmp_path, kind))
    config = json.loads((folder / "config.json").read_text())
    del config["checksums"]
    refused = 0
    for file, content in (
        ("config.json", config),
        ("tokenizer.json", json.loads((folder / "tokenizer.json").read_text())),
    ):
        for number, path in enumerate(leaves(content)):
            for value in (BAD_VALUES[number % 7], BAD_VALUES[(number + 3) % 7]):
                changed = copy.deepcopy(content)
                reduce(lambda inner, name: inner[name], path[:-1], changed)[path[-1]] = value
                (folder / "config.json").write_text(json.dumps(config))
                (folder / file).write_text(json.dumps(changed))
                try:
                    load_recogniser(read_export(folder))
                except UserError:
                    refused += 1
        (folder / file).write_text(json.dumps(content))
    assert refused > 80


@pytest.mark.parametrize("layers", [2, 10**7])
def test_settings_that_the_weights_do_not_have_are_refused_at_once(layers: int, tmp_path: Path) -> None:
    folder = Path(make_export(tmp_path))
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["num_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"does not fit its config\.json: it has 1 blocks instead of {layers}"):
        load_recogniser(read_export(folder))


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-5, 3, (frames, 80)).astype(np.float32)


def make_dataset(folder: Path, recordings: list[tuple[Recording, np.ndarray]]) -> str:
    with DatasetWriter(folder, FeatureSettings()) as writer:
        for recording, log_mel in recordings:
            writer.add(replace(recording, split="test"), log_mel)
        writer.finish()
    return str(folder)


def evaluate(
    export: str, dataset: str, out: Path, inference: InferenceSettings | None = None, **more: Any
) -> dict[str, Any]:
    data = DataSettings(dataset, language=more.pop("language", ""))
    inference = inference or InferenceSettings(context_seconds=2.0, batch_seconds=8.0)
    script.evaluate(
        script.Config(export, str(out), data=data, inference=inference, resamples=100, device="cpu", **more), World()
    )
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_export(tmp_path_factory.mktemp("run"))


def test_recordings_without_a_transcript_are_counted_before_any_work(export: str, tmp_path: Path) -> None:
    rows = [(Recording(name, "ana" if name == "b" else None), noise(50)) for name in "abc"]
    dataset = make_dataset(tmp_path / "data", rows)
    with pytest.raises(UserError, match="2 of 3 recordings have no transcript, such as 'a'"):
        evaluate(export, dataset, tmp_path / "out")
    with pytest.raises(UserError, match="no recording with .*language 'xx'"):
        evaluate(export, dataset, tmp_path / "out", language="xx")
    assert not (tmp_path / "out").exists()


def test_languages_without_specific_rules_are_normalised_by_the_general_ones_and_listed(
    export: str, tmp_path: Path
) -> None:
    texts = {"cy": "Dw i'n HOFFI coffi!", "en": "I don't like colour", "": "ana"}
    rows = [(Recording(f"text-{code}", text, language=code), noise(150)) for code, text in texts.items()]
    results = evaluate(export, make_dataset(tmp_path / "data", rows), tmp_path / "out")
    references = {row["id"]: (row["normaliser"], row["reference"]) for row in results["recordings"]}
    assert references == {
        "text-cy": ("unicode", "dw i n hoffi coffi"),
        "text-en": ("whisper-english", "i do not like color"),
        "text-": ("unicode", "ana"),
    }
    assert results["normalisers"].keys() == {"unicode", "whisper-english"}
    assert results["normalisers"]["unicode"]["languages"] == ["", "cy"]
    note = "languages without specific rules: not given, cy"
    assert results["normalisers"]["unicode"]["note"] == note
    assert note in (tmp_path / "out/report.html").read_text()
    assert "note" not in results["normalisers"]["whisper-english"]


CONFIGURATIONS: dict[str, tuple[str, InferenceSettings, DecoderSettings]] = {
    f"{kind}, {mode}, beam {beam}": (kind, InferenceSettings(mode, 2.0, 0.5, 8.0), DecoderSettings(beam=beam))
    for kind, modes in (
        ("ctc", ("buffered", "averaged", "stitched", "whole", "streaming")), ("rnnt", ("buffered", "stitched"))
    )
    for mode in modes
    for beam in ((1, 2) if mode in ("buffered", "stitched") else (1,))
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_short_silent_and_long_recordings_are_scored_in_every_mode(name: str, tmp_path: Path) -> None:
    kind, inference, decoder = CONFIGURATIONS[name]
    constant = np.linspace(-13.8, 2, 80, dtype=np.float32)
    rows = [
        (Recording("a-frame", "ana bela"), noise(1)),
        (Recording("a-tenth-of-a-second", "ana bela"), noise(10, 1)),
        (Recording("digital-silence", ""), np.full((100, 80), np.log(1e-6), np.float32)),  # below a window
        (Recording("long", "ana bela cid"), noise(901, 2)),
        (Recording("long-silence", ""), np.repeat(constant[None], 901, axis=0)),  # every bin constant
    ]
    results = evaluate(
        make_export(tmp_path, kind), make_dataset(tmp_path / "data", rows), tmp_path / "out", inference, decoder=decoder
    )
    by_id = {row["id"]: row for row in results["recordings"]}
    assert by_id.keys() == {recording.id for recording, _ in rows} and by_id["long"]["hypothesis"]
    for id, row in by_id.items():
        num_words = 0 if "silence" in id else 3 if id == "long" else 2
        assert row["word_hits"] + row["word_substitutions"] + row["word_deletions"] == num_words
        assert (row["wer"] is None) == (num_words == 0)
    total = results["scores"]["all"]
    errors = sum(row[f"word_{kind}"] for row in by_id.values() for kind in ("substitutions", "deletions", "insertions"))
    assert total["wer"] == pytest.approx(errors / 7) and total["num_recordings"] == 5


def test_a_recording_within_a_window_has_the_same_transcript_in_every_mode(export: str, tmp_path: Path) -> None:
    rows = [(Recording(f"text-{frames}", "ana"), noise(frames, frames)) for frames in (1, 10, 77, 199, 200)]
    dataset = make_dataset(tmp_path / "data", rows)
    modes: list[Mode] = ["buffered", "averaged", "stitched", "whole"]
    rows_by_mode = [
        evaluate(export, dataset, tmp_path / mode, InferenceSettings(mode, 2.0, 0.5))["recordings"] for mode in modes
    ]
    assert all(mode_rows == rows_by_mode[0] for mode_rows in rows_by_mode)
    assert any(row["hypothesis"] for row in rows_by_mode[0])


def test_silence_alone_has_no_error_rate(export: str, tmp_path: Path) -> None:
    rows = [(Recording(name, ""), np.zeros((60, 80), np.float32)) for name in "ab"]
    total = evaluate(export, make_dataset(tmp_path / "data", rows), tmp_path / "out")["scores"]["all"]
    assert total["wer"] is None and total["wer_interval"] is None and total["words"]["deletions"] == 0


def test_non_finite_features_name_the_recording_and_keep_the_others(export: str, tmp_path: Path) -> None:
    """As after a disk fault, since DatasetWriter refuses such values."""
    with pytest.raises(UserError, match="'bad': log-mel with NaN or infinite values"):
        make_dataset(tmp_path / "never", [(Recording("bad", "ana"), np.full((50, 80), np.nan, np.float32))])
    rows = [(Recording(f"text-{n}", "ana"), noise(300 - 10 * n, n)) for n in range(8)]
    dataset = make_dataset(tmp_path / "data", rows)
    whole = evaluate(export, dataset, tmp_path / "whole")
    values = open_dataset(dataset).read(7)
    [shard] = Path(dataset).glob("shard-*")
    good = shard.read_bytes()
    place = good.index(values[100].tobytes())
    shard.write_bytes(good[:place] + b"\xff\x7f" + good[place + 2 :])
    out = tmp_path / "out"
    with pytest.raises(UserError, match="text-7"):
        evaluate(export, dataset, out)
    assert not (out / "results.json").exists()
    partial_results = "".join(path.read_text() for path in out.rglob("*.jsonl"))
    assert "text-0" in partial_results and "text-7" not in partial_results
    shard.write_bytes(good)
    assert evaluate(export, dataset, out)["recordings"] == whole["recordings"]


@pytest.mark.parametrize(("field", "value"), [
    ("num_mels", 40), ("window_ms", 20.0), ("hop_ms", 8.0), ("n_fft", 1024), ("low_hz", 60.0), ("high_hz", 7600.0),
    ("mel_scale", "slaney"), ("log_floor", 1e-5), ("channels", "first"), ("standardized", True), ("sample_rate", 18000),
])  # fmt: skip
def test_an_export_with_other_features_is_refused_naming_the_field(field: str, value: Any, tmp_path: Path) -> None:
    other = make_export(tmp_path, **{field: value})
    dataset = make_dataset(tmp_path / "data", [(Recording("a", "ana"), noise(50))])
    with pytest.raises(UserError, match=f"{field}: {value!r} != "):
        evaluate(other, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def record_sources(
    original: Any, into: list[RecordingSource], decoder: Decoder, sources: Any, *rest: Any
) -> Iterator[Any]:
    into.extend(sources)
    return original(decoder, sources, *rest)


def test_features_of_audio_are_those_of_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"num_mels": 40, "high_hz": 4000.0, "hop_ms": 8.0, "mel_scale": "slaney"}
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(scale=0.1, size=12000), 16000)
    sources: list[RecordingSource] = []
    monkeypatch.setattr(transcribe, "decode_recordings", partial(record_sources, transcribe.decode_recordings, sources))
    config = transcribe.Config(
        make_export(tmp_path, **changes), str(tmp_path / "a.wav"), str(tmp_path / "out"), device="cpu"
    )
    assert transcribe.transcribe(config, World()) == 0
    expected = extract(FileSource(Recording("a"), tmp_path / "a.wav"), FeatureSettings(**changes))
    assert isinstance(expected, Extracted) and len(expected.log_mel) == sources[0].num_frames
    log_mel = expected.log_mel.astype(np.float64)
    normal = (log_mel - log_mel.mean(axis=0)) / log_mel.std(axis=0)
    assert np.allclose(sources[0].read_mel(0, sources[0].num_frames).numpy(), normal, atol=0.01)


def test_one_damaged_file_in_a_hundred_is_named_and_the_others_are_transcribed(
    export: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    (tmp_path / "talks").mkdir()
    for number in range(100):
        samples = generator.normal(scale=0.1, size=3200 + 80 * number)
        soundfile.write(tmp_path / f"talks/{number:03}.wav", samples, 16000)
    damaged = tmp_path / "talks/042.wav"
    damaged.write_bytes(damaged.read_bytes()[:30])
    command = ["transcribe.py", "--export", export, "--audio", str(tmp_path / "talks"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*command, "--device", "cpu"])
    monkeypatch.setattr(transcribe, "start_inference", lambda *settings: World())
    with pytest.raises(SystemExit) as exit_info:
        run_main(transcribe.main)
    assert exit_info.value.code == 1
    printed = capsys.readouterr()
    assert "99 of 100 files are transcribed" in printed.out
    headline, reason = printed.err.strip().splitlines()
    assert headline == "error: 1 of 100 audio files could not be transcribed:" and reason.strip().startswith("042: ")
    assert "Traceback" not in printed.err
    names = [f"{number:03}" for number in range(100) if number != 42]
    for form in ("txt", "json"):
        assert sorted(path.stem for path in (tmp_path / "out").glob(f"*.{form}")) == names
    assert sum(bool((tmp_path / f"out/{name}.txt").read_text().strip()) for name in names) > 90
    [line] = (tmp_path / "out/failed.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(damaged) and json.loads(line)["reason"]


def peak_bytes(decoder: Decoder, mode: Mode, seconds: int) -> int:
    """Peak bytes of tensors, without the model, while decoding a recording of 25 mel frames per second."""
    frames = torch.randn(1000, 8)

    def read(start: int, stop: int) -> Tensor:
        return frames[:1].new_zeros(stop - start, 8) + frames[start % 997]

    settings = InferenceSettings(mode, 60.0, 0.25, batch_seconds=240.0)
    with LiveBytes() as live:
        [(_, tokens)] = decode_recordings(decoder, [RecordingSource(25 * seconds, read)], settings, 4, 25.0)
    assert tokens.ids
    return live.peak


@pytest.mark.parametrize("mode", ["buffered", "averaged", "stitched"])
def test_three_hours_need_the_memory_of_ten_minutes_and_a_few_bytes_per_frame(mode: Mode) -> None:
    decoder = GreedyCTC(make_model(num_mels=8, vocab_size=64).log_probs)
    short, long = (peak_bytes(decoder, mode, seconds) for seconds in (600, 3 * 3600))
    encoder_frames = (3 * 3600 - 600) * 25 / 4
    assert long <= short + 40 * encoder_frames
