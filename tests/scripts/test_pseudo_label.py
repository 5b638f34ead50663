"""tools/pseudo_label.py: the dataset, its provenance, resumption, other filters, errors before any work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bestrq.decoding.ngram import train_ngram, write_arpa
from bestrq.long_form.decoders import DecoderSettings
from bestrq.report.result_files import read_transcripts
from bestrq.training.process import World
from common.errors import UserError
from common.text import label_text
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.shards.derive import derive, stored_recording
from data.shards.integrity import find_faults
from data.tokenizer import load_tokenizer
from evaluate import evaluate
from pipelines import evaluation_settings
from pipelines.curriculum import choose_labelled
from pipelines.pseudo_labels import FilterSettings
from tests.gloo import run_distributed
from tests.scripts.test_evaluate import make_export
from tests.tiny import make_dataset
from tools import pseudo_label as script


@pytest.fixture
def setup(tmp_path: Path) -> script.Config:
    make_dataset(tmp_path / "data", recordings=20)
    (tmp_path / "run").mkdir()
    export = make_export(tmp_path / "run/export", FeatureSettings())
    data = script.DataSettings(str(tmp_path / "data"), "train")
    return script.Config(export=str(export), out=str(tmp_path / "pseudo"), data=data, device="cpu")


def run(config: script.Config) -> Dataset:
    script.pseudo_label(config, World())
    return open_dataset(config.out)


def summary_of(config: script.Config) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((Path(config.out) / script.SUMMARY).read_text(encoding="utf-8"))
    return summary


def hypotheses_of(config: script.Config) -> list[dict[str, Any]]:
    lines = (Path(config.out) / script.HYPOTHESES).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def content(dataset: Dataset) -> dict[str, tuple[str | None, Any]]:
    return {dataset.id(i): (dataset.text(i), dataset.words(i)) for i in range(len(dataset))}


def test_the_dataset_has_the_hypotheses_of_evaluate_with_word_times_and_linked_shards(
    setup: script.Config, tmp_path: Path
) -> None:
    dataset, source = run(setup), open_dataset(setup.data.dataset)
    data = evaluation_settings.DataSettings(setup.data.dataset, split="train")
    results = tmp_path / "results"
    evaluate(evaluation_settings.Config(setup.export, str(results), data=data, resamples=100, device="cpu"), World())
    expected = {line["id"]: line for line in read_transcripts(results)}
    assert len(dataset) == len(expected) == 16
    for id, (text, words) in content(dataset).items():
        assert text == label_text(expected[id]["text"], "en") == " ".join(word.word for word in words)
        assert [list(word[:3]) for word in words] == [word[:3] for word in expected[id]["words"]]
        number = source.index.find(id)
        assert np.array_equal(dataset.read(dataset.index.find(id)), source.read(number))
        assert dataset.split(dataset.index.find(id)) == "train"
    assert find_faults(dataset, 1) == []
    shards = [next(Path(place).glob("shard-*")) for place in (setup.out, setup.data.dataset)]
    assert shards[0].samefile(shards[1]), "audio is not copied"
    assert not list(tmp_path.glob("pseudo.*")), "nothing else is left"


def test_the_filter_and_its_precision_are_recorded_and_drawn(setup: script.Config, tmp_path: Path) -> None:
    config = replace(setup, filter=FilterSettings(keep=0.5))
    dataset, source = run(config), open_dataset(setup.data.dataset)
    summary, lines = summary_of(config), hypotheses_of(config)
    assert len(lines) == summary["decoded"]["recordings"] == 16
    kept = {line["id"] for line in lines if line["kept"]}
    assert kept == set(content(dataset)) and 0 < len(kept) < 16
    assert min(line["label"] for line in lines if line["kept"]) == summary["threshold"]
    assert max(line["label"] for line in lines if not line["kept"]) < summary["threshold"]
    frames = {line["id"]: int(source.frames[source.index.find(line["id"])]) for line in lines}
    assert sum(frames[id] for id in kept) <= 0.5 * sum(frames.values())
    assert summary["fingerprint"] == source.fingerprint and summary["export"] == setup.export
    assert summary["decoder"] == "greedy CTC, no language model" and len(summary["export_hash"]) == 64
    assert summary["precision"]["filter"]["kept_recordings"] == len(kept)
    assert summary["precision"]["rows"][-1]["kept_share"] == pytest.approx(1.0)
    assert (Path(config.out) / script.PICTURE).read_text(encoding="utf-8").startswith("<svg")


def without_references(dataset: str, out: Path) -> str:
    source = open_dataset(dataset)
    recordings = ((source, i, replace(stored_recording(source, i), text=None, words=None)) for i in range(len(source)))
    derive(out, recordings)
    return str(out)


def test_references_do_not_influence_the_choice(setup: script.Config, tmp_path: Path) -> None:
    first = run(replace(setup, filter=FilterSettings(keep=0.5)))
    data = replace(setup.data, dataset=without_references(setup.data.dataset, tmp_path / "unlabelled"))
    other = replace(setup, out=str(tmp_path / "other"), data=data, filter=FilterSettings(keep=0.5))
    assert content(run(other)) == content(first)
    assert summary_of(other)["precision"] is None and not (tmp_path / "other" / script.PICTURE).exists()


def test_the_recordings_of_the_labels_are_left_out(setup: script.Config) -> None:
    source = open_dataset(setup.data.dataset)
    labelled = choose_labelled(source, source.select("train"), 0.2, 7)
    config = replace(setup, labels=script.LabelSettings(minutes=0.2, seed=7))
    ids = set(content(run(config)))
    train = {source.id(int(i)) for i in source.select("train")}
    assert ids == train - {source.id(int(i)) for i in labelled} and 0 < len(labelled) < len(train)
    with pytest.raises(UserError, match="all selected recordings are labelled"):
        script.unlabelled_recordings(source, replace(setup, labels=script.LabelSettings(minutes=1000)))


def test_labels_of_a_run_on_all_languages_are_left_out_of_one_language(setup: script.Config, tmp_path: Path) -> None:
    source = open_dataset(setup.data.dataset)
    languages = (
        (source, i, replace(stored_recording(source, i), language="en" if i % 2 else "cs")) for i in range(len(source))
    )
    dataset = derive(tmp_path / "two", languages)
    labels = script.LabelSettings(minutes=0.2, seed=7)
    left = {}
    for language in (None, "", "cs"):
        config = replace(setup, data=replace(setup.data, language="cs"), labels=replace(labels, language=language))
        left[language] = set(script.unlabelled_recordings(dataset, config))
    labelled = choose_labelled(dataset, dataset.select("train"), 0.2, 7)
    assert left[""] == set(dataset.select("train", "cs").tolist()) - set(labelled.tolist())
    assert left[None] == left["cs"] != left[""]


def test_labels_without_transcripts_are_refused(setup: script.Config, tmp_path: Path) -> None:
    unlabelled = without_references(setup.data.dataset, tmp_path / "unlabelled")
    config = replace(setup, data=replace(setup.data, dataset=unlabelled), labels=script.LabelSettings(minutes=1))
    with pytest.raises(UserError, match="labels.minutes is 1, but split 'train' .* has no transcripts"):
        run(config)
    assert not Path(setup.out).exists()


def test_an_interrupted_run_continues_to_the_same_dataset(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(setup).fingerprint
    config = replace(setup, out=str(tmp_path / "again"))
    decode = script.decode

    def interrupted(*arguments: Any) -> Any:
        for count, item in enumerate(decode(*arguments)):
            if count == 7:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(script, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not Path(config.out).exists()
    log = next((tmp_path / "again.hypotheses").glob("*.jsonl"))
    log.write_bytes(log.read_bytes()[:-20])  # the process was killed while it wrote a line
    monkeypatch.setattr(script, "decode", decode)
    assert run(config).fingerprint == expected
    assert "continuing: 6 of 16 recordings are already decoded" in capsys.readouterr().out
    monkeypatch.setattr(script, "decode", None)
    run(config)
    assert "already holds these pseudo-labels" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists and has other content"):
        run(replace(config, filter=FilterSettings(keep=0.5)))


def test_kept_hypotheses_serve_other_filters(
    setup: script.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(setup, hypotheses=str(tmp_path / "hypotheses"))
    everything = content(run(config))
    monkeypatch.setattr(script, "decode", lambda *arguments: iter(()))
    word = FilterSettings(confidence="word", keep=0.5)
    half = run(replace(config, out=str(tmp_path / "half"), filter=word))
    lines = hypotheses_of(replace(config, out=str(tmp_path / "half")))
    assert content(half).items() <= everything.items() and len(half) < len(everything)
    assert min(line["word"] for line in lines if line["kept"]) > max(line["word"] for line in lines if not line["kept"])
    monkeypatch.undo()
    run(replace(config, out=str(tmp_path / "beam"), decoder=DecoderSettings(beam=2)))
    logs = list((tmp_path / "hypotheses").glob("*.jsonl"))
    assert len(logs) == 2, "those of another decoder are not reused"


def test_doubtful_words_are_cut_out(setup: script.Config, tmp_path: Path) -> None:
    whole = run(setup)
    confidences = [word.confidence for i in range(len(whole)) for word in whole.words(i) or ()]
    minimum = float(np.median(confidences))
    config = replace(setup, out=str(tmp_path / "cut"), filter=FilterSettings(min_word_confidence=minimum))
    cut = run(config)
    assert find_faults(cut, 1) == []
    for id, (text, words) in content(cut).items():
        before = whole.words(whole.index.find(id)) or []
        assert words == [word for word in before if word.confidence >= minimum]
        assert text == " ".join(word.word for word in words)
        assert bool(cut.excluded(cut.index.find(id))) == (len(words) < len(before))
    high = FilterSettings(min_word_confidence=float(np.quantile(confidences, 0.97)))
    config = replace(setup, out=str(tmp_path / "few"), filter=high)
    few = run(config)
    assert {line["id"] for line in hypotheses_of(config) if line["kept"]} == set(content(few))
    assert 0 < len(few) < len(whole), "recordings without a word left are not kept"
    with pytest.raises(UserError, match=r"filter.min_word_confidence is 1.0, .* give a lower one"):
        run(replace(setup, out=str(tmp_path / "none"), filter=FilterSettings(min_word_confidence=1.0)))
    assert not (tmp_path / "none").exists()


def test_a_beam_with_a_language_model_decodes_and_is_recorded(setup: script.Config, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(setup.export)
    texts = [tokenizer.encode(text) for text in ("ana bela cid", "dora eva fabio", "gil hugo ida jan")]
    write_arpa(tmp_path / "lm.arpa", train_ngram(texts, 3, tokenizer.vocab_size), tokenizer.pieces)
    decoder = DecoderSettings(beam=4, language_model=str(tmp_path / "lm.arpa"), language_model_weight=2.0)
    greedy = content(run(setup))
    config = replace(setup, out=str(tmp_path / "beam"), decoder=decoder)
    assert content(run(config)) != greedy
    summary = summary_of(config)
    assert summary["decoder"] == "CTC, beam of 4, language model of weight 2"
    assert summary["decoder_settings"]["language_model"] == str(tmp_path / "lm.arpa")


def in_a_process(world: World, config: script.Config) -> None:
    script.pseudo_label(config, world)


def test_two_processes_make_the_dataset_of_one(setup: script.Config, tmp_path: Path) -> None:
    expected = run(setup).fingerprint
    config = replace(setup, out=str(tmp_path / "two"))
    run_distributed(in_a_process, 2, config)
    assert open_dataset(config.out).fingerprint == expected


@pytest.mark.parametrize("name", ["export", "out", "data.dataset"])
def test_missing_settings_are_named(setup: script.Config, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is missing"):
        replace(setup, **({"data": script.DataSettings()} if name == "data.dataset" else {name: ""}))
