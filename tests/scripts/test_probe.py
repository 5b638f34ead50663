"""Probe ladder from an export to a table: what it holds apart, what it computes again, what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pretrain
from bestrq.model.conformer import EncoderSettings
from bestrq.pretraining.probing import CTCProbeSettings
from common.config import parse
from common.errors import UserError
from data.corpora.espeak import Phone
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.transcripts import Word
from pipelines import gauge_phones
from pipelines.probe_data import ProbeDataSettings, letters, read_times, select_classes, select_labelled
from pipelines.probe_layers import read_material
from pipelines.probing import Source, _key
from tests.tiny import DATA, ENCODER, RUN, WORDS
from tools import probe

SPEAKERS = 3
FEW = ["--ctc.steps=8", "--ctc.width=16", "--data.per_class=12"]


def write(path: Path, recordings: int = 90, shared_texts: bool = False) -> Path:
    """Recordings of three speakers in two languages; frames depend on word and speaker, every tenth is in split dev."""
    rng = np.random.default_rng(0)
    spectra, voices = rng.normal(size=(len(WORDS), 80)) * 2, rng.normal(size=(SPEAKERS, 80))
    with DatasetWriter(path, FeatureSettings()) as writer:
        for number in range(recordings):
            spoken = rng.integers(0, len(WORDS), 4)
            if shared_texts:
                spoken = np.array([number // 2 % 20 % len(WORDS), number // 2 % 20 // len(WORDS)])
            frames = 40 * len(spoken)
            log_mel = spectra[spoken.repeat(40)] + voices[number % SPEAKERS] + rng.normal(size=(frames, 80))
            writer.add(
                Recording(
                    f"rec-{number:03d}",
                    " ".join(WORDS[w] for w in spoken),
                    [Word(WORDS[w], 0.4 * i, 0.4 * (i + 1)) for i, w in enumerate(spoken)],
                    language="en" if number % SPEAKERS else "de",
                    speaker=f"s{number % SPEAKERS}",
                    split="dev" if number % 10 == 0 else "train",
                ),
                log_mel.astype(np.float32),
            )
        writer.finish()
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def export(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", "--data.num_workers=0", "--run.steps=2"]
    pretrain.train(parse(pretrain.Config, [*ENCODER, *DATA, *RUN, *places, "--quantizer.codebook_size=64"]))
    return folder / "export"


def climb(export: Path, dataset: Path, out: Path, *more: str) -> dict[str, Any]:
    options = [f"--export={export}", f"--data.dataset={dataset}", f"--out={out}", "--device=cpu", *FEW, *more]
    probe.probe(parse(probe.Config, options))
    return json.loads((out / "probes.json").read_text())


@pytest.fixture(scope="module")
def ladder(export: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("results")
    return out, climb(export, dataset, out)


PROBES = ["nats", "cer", "phone", "speaker", "language", "abx_within", "abx_across"]


def test_every_layer_has_every_probe_beside_log_mel_and_a_random_encoder(ladder: tuple[Path, dict[str, Any]]) -> None:
    out, summary = ladder
    assert [source["kind"] for source in summary["sources"]] == ["log-mel", "random", "export"]
    assert [list(source["layers"]) for source in summary["sources"]] == [["0"], *[["0", "1", "2", "weighted"]] * 2]
    assert summary["skipped"] == {}
    for source in summary["sources"]:
        for layer, values in source["layers"].items():
            for name in PROBES if layer != "weighted" else PROBES[:2]:
                low, high = values[name]["interval"]
                assert low <= values[name]["rate"] <= high and values[name]["rate"] >= 0
            assert layer == "weighted" or 0 < values["effective_rank"] <= values["effective_rank_entropy"]
    compared = {(c["baseline"], c["probe"]) for c in summary["comparisons"]}
    assert compared == {(baseline, name) for baseline in ("log-mel", "random") for name in PROBES}
    mel = summary["sources"][0]["layers"]["0"]
    assert mel["phone"]["rate"] < summary["chance"]["phone"] and mel["abx_within"]["rate"] < 0.1, "words are visible"
    assert "<svg" in (out / "probes.svg").read_text()


def test_a_finished_ladder_is_read_and_a_missing_layer_is_computed_again(
    ladder: tuple[Path, dict[str, Any]], export: Path, dataset: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "copy"
    shutil.copytree(ladder[0], out)
    same = ("sources", "comparisons", "chance")
    assert {name: climb(export, dataset, out)[name] for name in same} == {name: ladder[1][name] for name in same}
    assert "encoded" not in capsys.readouterr().out
    files = sorted((out / "layers").rglob("*.json"))
    assert len(files) == 1 + 4 + 4
    missing = [file for file in files if file.name == "1.json"]
    kept = {file: file.stat().st_mtime_ns for file in files if file not in missing}
    for file in missing:
        file.unlink()
    again = climb(export, dataset, out)
    assert {name: again[name] for name in same} == {name: ladder[1][name] for name in same}
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert capsys.readouterr().out.count("layer 1:") == 2


def test_other_settings_do_not_reuse_results(
    ladder: tuple[Path, dict[str, Any]], export: Path, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(ladder[0], out)
    climb(export, dataset, out, "--ctc.steps=9")
    assert len(list((out / "layers").iterdir())) == 2 * 3


def test_no_text_is_on_both_sides_of_a_probe(tmp_path: Path) -> None:
    """Twenty texts, four of them in both splits: a probe that memorises texts must not be rewarded."""
    data = open_dataset(write(tmp_path / "shared", shared_texts=True))
    for split in ("auto", "dev", ""):
        settings = ProbeDataSettings(evaluation_split=split, evaluation_minutes=0.05)
        chosen = select_labelled(data, settings, 4)
        assert set(chosen.train.texts).isdisjoint(chosen.evaluation.texts)
        assert set(chosen.train.recordings).isdisjoint(chosen.evaluation.recordings)
        assert 10 <= len(chosen.train.texts) < len(data.select("train")), "recordings with a held-out text are left out"


def test_speakers_are_identified_on_other_recordings_and_other_texts(dataset: Path, tmp_path: Path) -> None:
    for data in (open_dataset(dataset), open_dataset(write(tmp_path / "shared", shared_texts=True))):
        settings = ProbeDataSettings(per_class=12, seed=1)
        chosen = select_classes(data, "speaker", settings)
        assert not isinstance(chosen, str) and chosen.classes == ["s0", "s1", "s2"]
        train, evaluation = ([number for number, _ in side] for side in (chosen.train, chosen.evaluation))
        assert set(train).isdisjoint(evaluation) and len(set(train)) == len(train)
        assert {data.text(number) for number in train}.isdisjoint({data.text(number) for number in evaluation})
        assert all(data.speaker(number) == chosen.classes[label] for number, label in chosen.train)


def test_labels_must_fit_the_frames_of_the_slowest_layer(dataset: Path) -> None:
    data = open_dataset(dataset)
    assert len(select_labelled(data, ProbeDataSettings(), 4).train.texts) > 50
    with pytest.raises(UserError, match="0 recordings to train"):
        select_labelled(data, ProbeDataSettings(), 16)  # 160 mel frames, 10 encoder frames, 15 characters or more


def test_phones_of_espeak_replace_the_letters_of_words(dataset: Path) -> None:
    data, encoder_stride = open_dataset(dataset), 4
    settings = ProbeDataSettings(phones="words", language="en")
    material = read_material(data, settings, encoder_stride)
    assert all(material.times) and "phone" not in material.skipped
    symbols = {symbol for times in material.times for symbol, _, _ in times}
    assert symbols - set("".join(WORDS)) and "" not in symbols
    source = Source("x", "log-mel", EncoderSettings(), "recording", "", None)
    keys = {_key(source, data, material, each, CTCProbeSettings()) for each in (settings, replace(settings, phones=""))}
    assert len(keys) == 2


def test_pauses_and_unknown_phones_are_no_phones_of_the_probe(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [[Phone("a", 0.0, 0.1), Phone("", 0.1, 0.2), Phone("?", 0.2, 0.3), Phone("b", 0.3, 0.4)], None]
    monkeypatch.setattr(gauge_phones, "find_phones", lambda *_: (found, "exact"))
    times = read_times(open_dataset(dataset), ProbeDataSettings(phones="exact"), [1, 2])
    assert times == [[("a", 0.0, 0.1), ("b", 0.3, 0.4)], []]


def test_phones_come_from_a_file_or_from_the_letters_of_words(dataset: Path, tmp_path: Path) -> None:
    data: Dataset = open_dataset(dataset)
    words = data.words(0) or []
    spelled = letters(data, 0)
    assert "".join(symbol for symbol, _, _ in spelled) == "".join(word.word for word in words)
    assert spelled[0][1] == words[0].start and spelled[-1][2] == pytest.approx(words[-1].end)
    path = tmp_path / "phones.jsonl"
    path.write_text(json.dumps({"id": data.id(1), "phones": [["a", 0.0, 0.5], ["b", 0.5, 0.9]]}) + "\n")
    settings = ProbeDataSettings(phones=str(path))
    assert read_times(data, settings, [0, 1]) == [[], [("a", 0.0, 0.5), ("b", 0.5, 0.9)]]
    path.write_text(json.dumps({"id": data.id(1), "phones": [["a", "x"]]}) + "\n")
    with pytest.raises(UserError, match="phones = "):
        read_times(data, settings, [1])


def test_mistakes_are_named_before_any_work(export: Path, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export is missing"):
        parse(probe.Config, [f"--data.dataset={dataset}"])
    with pytest.raises(UserError, match="no export at"):
        climb(tmp_path / "nothing", dataset, tmp_path / "out")
    with pytest.raises(UserError, match="evaluation_split is 'train'"):
        climb(export, dataset, tmp_path / "out", "--data.evaluation_split=train")
    config = json.loads((export / "config.json").read_text())
    config["features"]["hop_ms"] = 20
    other = tmp_path / "export"
    shutil.copytree(export, other)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit the dataset"):
        climb(other, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
