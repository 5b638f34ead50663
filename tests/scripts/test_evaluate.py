"""evaluate.py: equal numbers from one process, two processes and an interrupted run; errors before any work."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch

import evaluate as script
from bestrq.long_form.inference import InferenceSettings
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.ctc import CTCModel
from bestrq.report.result_files import SCORING, read_transcripts
from bestrq.scoring.normalisers import RULES_VERSION
from bestrq.training.export import write_export
from bestrq.training.export_reading import read_export
from bestrq.training.process import World
from common.config import to_dict
from common.errors import UserError
from data.features import FeatureSettings
from data.format.dataset import open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.tokenizer import CharTokenizer
from pipelines import evaluation
from pipelines.evaluation_settings import DataSettings
from pipelines.recogniser import hash_of_export, load_recogniser, mel_reader, share_out
from tests.gloo import run_distributed
from tests.report.test_report import check_page
from tests.tiny import make_dataset
from transcribe import source_of


def make_export(folder: Path, features: FeatureSettings, kind: str = "ctc") -> Path:
    """Export of an untrained recogniser with weights large enough for a hypothesis."""
    torch.manual_seed(1)
    encoder = EncoderSettings(
        dim=16, num_layers=2, num_heads=2, feedforward_dim=24, kernel_size=5, subsampling_channels=4
    )
    tokenizer = CharTokenizer(list(" abcdefghijklmnopqrstuvwxyz"))
    model = CTCModel(encoder, tokenizer.vocab_size)
    with torch.no_grad():
        model.head.weight *= 20
    tokenizer.save(folder.parent / "tokenizer")
    config = {
        "kind": kind, "encoder": to_dict(encoder), "vocab_size": tokenizer.vocab_size,
        "features": features.to_dict(), "feature_hash": features.hash(), "normalisation": "recording",
    }  # fmt: skip
    files = {path.name: path.read_bytes() for path in (folder.parent / "tokenizer").iterdir()}
    write_export(folder, model.state_dict(), config, "a card", files)
    return folder


def with_extra_files(export: str | Path, copy: Path) -> str:
    """Path of a copy of an export with leftovers of downloads, editors and file managers."""
    shutil.copytree(export, copy)
    for name in (".cache/huggingface/download", ".ipynb_checkpoints"):
        (copy / name).mkdir(parents=True)
        (copy / name / "config.json").write_text("{}")
    for name in (".gitattributes", "notes.txt", "._model.safetensors", "tokenizer.model"):
        (copy / name).write_bytes(b"unused")
    return str(copy)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> script.Config:
    folder = tmp_path_factory.mktemp("evaluate")
    make_dataset(folder / "data")
    (folder / "run").mkdir()
    make_export(folder / "run" / "export", FeatureSettings())
    return script.Config(
        export=str(folder / "run" / "export"),
        data=DataSettings(dataset=str(folder / "data"), split="train"),
        inference=InferenceSettings(context_seconds=2.0, batch_seconds=8.0),
        resamples=200,
        device="cpu",
    )


def evaluate(config: script.Config, out: Path) -> dict[str, Any]:
    script.evaluate(replace(config, out=str(out)), World())
    return json.loads((out / "results.json").read_text())


def comparable(results: dict[str, Any]) -> dict[str, Any]:
    kept = ("key", "scores", "recordings", "dataset", "export_hash", "positions", "edge_distances", "confusions")
    return {key: results[key] for key in kept}


def test_results_are_complete_and_agree_with_jiwer(setup: script.Config, tmp_path: Path, capsys) -> None:
    results = evaluate(setup, tmp_path)
    rows = results["recordings"]
    assert len(rows) == 32 and [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    references, hypotheses = ([row[key] for row in rows] for key in ("reference", "hypothesis"))
    assert any(hypotheses)
    total = results["scores"]["all"]
    assert total["wer"] == pytest.approx(jiwer.wer(references, hypotheses), abs=1e-12)
    assert total["cer"] == pytest.approx(jiwer.cer(references, hypotheses), abs=1e-12)
    assert total["cer_interval"][0] <= total["cer"] <= total["cer_interval"][1]
    with open(tmp_path / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == [row["id"] for row in rows]
    assert [int(row["word_deletions"]) for row in table] == [row["word_deletions"] for row in rows]
    assert "Evaluation of run" in check_page(tmp_path / "report.html").text
    printed = capsys.readouterr().out
    assert f"{100 * total['wer']:.1f} %" in printed and "report.html" in printed
    names = ["report.html", "results.csv", "results.json", "transcripts.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_results_have_the_version_of_the_scoring_rules(setup: script.Config, tmp_path: Path) -> None:
    assert evaluate(setup, tmp_path)["versions"][SCORING] == RULES_VERSION


def test_alignments_and_positions_add_up_to_the_scores(setup: script.Config, tmp_path: Path) -> None:
    results = evaluate(setup, tmp_path)
    lines = {line["id"]: line for line in read_transcripts(tmp_path)}
    kinds = {"=": "hits", "S": "substitutions", "D": "deletions", "I": "insertions"}
    for row in results["recordings"]:
        counts = Counter(kinds[kind] for kind, *_ in lines[row["id"]]["alignment"])
        assert {name: counts[name] for name in kinds.values()} == {name: row[f"word_{name}"] for name in kinds.values()}
        assert " ".join(word for word, *_ in lines[row["id"]]["words"]).split() == lines[row["id"]]["text"].split()
        # The reference has word times, which place a deleted word.
        times = [time for kind, _, _, time in lines[row["id"]]["alignment"] if kind in "=SD"]
        assert times == sorted(times) and (not times or times[-1] <= row["seconds"] + 0.01)
    total = results["scores"]["all"]["words"]
    for name, count in total.items():
        assert sum(part["words"][name] for part in results["positions"]) == count
    # Only the long recordings have windows, and thus edges.
    long = [row for row in results["recordings"] if row["seconds"] > 2.0]
    distances = results["edge_distances"]
    assert 0 < len(long) < 32 and sum(sum(part["words"].values()) for part in distances) == sum(
        row[f"word_{name}"] for row in long for name in kinds.values()
    )
    cost = results["decoding"]
    assert cost["peak_mb"] >= 0 and cost["real_time_factor"] * cost["audio_seconds_per_second"] == pytest.approx(1)


def test_formats_can_be_written_after_the_evaluation(setup: script.Config, tmp_path: Path, monkeypatch) -> None:
    evaluate(setup, tmp_path)
    monkeypatch.setattr(evaluation, "decode_recordings", None)
    evaluate(replace(setup, formats="ctm, txt"), tmp_path)
    names = sorted(path.name for path in (tmp_path / "transcripts").iterdir())
    assert names == sorted(f"rec-{n:03d}.{form}" for n in range(32) for form in ("ctm", "txt"))
    [line] = [line for line in read_transcripts(tmp_path) if line["id"] == "rec-005"]
    assert (tmp_path / "transcripts/rec-005.txt").read_text() == line["text"] + "\n"
    ctm = [row.split() for row in (tmp_path / "transcripts/rec-005.ctm").read_text().splitlines()]
    assert [row[4] for row in ctm] == [word for word, *_ in line["words"]] and ctm[0][:2] == ["rec-005", "1"]
    with pytest.raises(UserError, match="formats = 'doc'"):
        replace(setup, formats="doc")


def test_other_data_is_normalised_with_the_statistics_of_the_model(tmp_path: Path) -> None:
    features = FeatureSettings()
    dataset = open_dataset(make_dataset(tmp_path / "data", recordings=10))
    (tmp_path / "run").mkdir()
    export = read_export(make_export(tmp_path / "run" / "export", features))
    mean, inverse_std = torch.linspace(-3, 3, 80), torch.linspace(0.5, 2, 80)
    export.config["normalisation"] = "dataset"
    with_statistics_of_data = mel_reader(load_recogniser(export), dataset, 3)(10, 50)
    export.config["statistics"] = {"mean": mean.tolist(), "inverse_std": inverse_std.tolist()}
    with_statistics_of_model = mel_reader(load_recogniser(export), dataset, 3)(10, 50)
    raw = torch.from_numpy(dataset.read(3, 10, 50)).float()
    torch.testing.assert_close(with_statistics_of_model, (raw - mean) * inverse_std)
    # A model trained on a mixture has no statistics: each dataset has its own.
    torch.testing.assert_close(with_statistics_of_data, torch.from_numpy(dataset.read_normalised(3, 10, 50, "dataset")))
    export.config["statistics"] = {"mean": [0.0], "inverse_std": [1.0]}
    with pytest.raises(UserError, match="statistics do not have 80 mel bins"):
        load_recogniser(export)


@pytest.mark.parametrize(("stated", "floor"), [({}, 0.0), ({"std_floor": 0.25}, 0.25), ({"std_floor": 0.5}, 0.5)])
def test_features_have_the_floor_of_the_standard_deviation_that_the_export_was_trained_with(
    tmp_path: Path, stated: dict[str, float], floor: float
) -> None:
    """Exports that do not state it are older, and were trained without. Audio files are normalised in the same way."""
    features = FeatureSettings()
    values = np.random.default_rng(0).normal(size=(300, 80)).astype(np.float16)
    values[:, :10] *= np.float16(0.02)  # far below the mean standard deviation
    with DatasetWriter(tmp_path / "data", features) as writer:
        writer.add(Recording("a"), values)
        writer.finish()
    export = read_export(make_export(tmp_path / "export", features))
    export.config.update(stated)
    recogniser = load_recogniser(export)
    dataset = open_dataset(tmp_path / "data")
    read = mel_reader(recogniser, dataset, 0)(0, 300)
    std = dataset.mean_std(0)[1]
    assert read[:, :10].std() == pytest.approx(0.02 / max(0.02, floor * float(std.mean())), rel=0.05)
    of_a_file = source_of(values, recogniser.statistics, recogniser.std_floor).read_mel(0, 300)
    assert torch.equal(of_a_file, read)
    export.config["std_floor"] = "high"
    with pytest.raises(UserError, match="std_floor is 'high', not a number"):
        load_recogniser(export)


def test_a_finished_evaluation_is_not_decoded_again(setup: script.Config, tmp_path: Path, monkeypatch) -> None:
    first = evaluate(setup, tmp_path)
    monkeypatch.setattr(evaluation, "decode_recordings", None)
    assert evaluate(setup, tmp_path) == first


def test_other_files_in_an_export_have_no_effect(setup: script.Config, tmp_path: Path, monkeypatch) -> None:
    first = evaluate(setup, tmp_path / "out")
    digest = hashlib.sha256()  # as in results of earlier versions
    for path in sorted(Path(setup.export).iterdir()):
        if path.name != "README.md":
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    assert first["export_hash"] == digest.hexdigest()
    monkeypatch.setattr(evaluation, "decode_recordings", None)
    copy = with_extra_files(setup.export, tmp_path / "run/export")
    assert evaluate(replace(setup, export=copy, name=first["name"]), tmp_path / "out") == first
    export = read_export(copy)
    assert hash_of_export(export) == first["export_hash"]
    with open(tmp_path / "run/export/tokenizer.json", "a") as file:
        file.write("\n")
    assert hash_of_export(export) != first["export_hash"]


def test_an_interrupted_evaluation_continues(setup: script.Config, tmp_path: Path, monkeypatch) -> None:
    whole = evaluate(setup, tmp_path / "whole")
    decoded: list[int] = []
    is_last_run = False

    def interrupted(model: Any, sources: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
        for count, output in enumerate(original(model, sources, *arguments, **options)):
            if count == 5 and not is_last_run:
                raise KeyboardInterrupt
            yield output
        decoded.append(len(sources))

    original = evaluation.decode_recordings
    monkeypatch.setattr(evaluation, "decode_recordings", interrupted)
    out = tmp_path / "broken"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(setup, out)
        # A killed process leaves an incomplete line, another evaluation a line with its key.
        with open(out / "partial-00003.jsonl", "w") as file:
            file.write('{"key": "another", "id": "rec-000", "text": "wrong"}\n{"key": "x", "id": "re')
    is_last_run = True
    assert comparable(evaluate(setup, out)) == comparable(whole)
    assert decoded == [32 - 10]  # five recordings of each of the two interrupted runs were kept


def test_other_settings_do_not_reuse_transcripts(setup: script.Config, tmp_path: Path) -> None:
    first = evaluate(setup, tmp_path)
    other = evaluate(replace(setup, inference=replace(setup.inference, context_seconds=0.0)), tmp_path)
    assert other["key"] != first["key"]
    larger_batch = evaluate(replace(setup, inference=replace(setup.inference, batch_seconds=60.0)), tmp_path / "b")
    assert larger_batch["key"] == first["key"]


def evaluate_on(world: World, config: script.Config) -> None:
    script.evaluate(config, world)


def test_two_processes_give_the_results_of_one(setup: script.Config, tmp_path: Path) -> None:
    one = evaluate(setup, tmp_path / "one")
    run_distributed(evaluate_on, 2, replace(setup, out=str(tmp_path / "two")))
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["decoding"]["world_size"] == 2
    assert read_transcripts(tmp_path / "two") == read_transcripts(tmp_path / "one")
    assert comparable(two) == comparable(one)


def test_recordings_are_shared_out_evenly_and_once() -> None:
    frames = np.random.default_rng(0).integers(10, 1000, size=101)
    shares = [share_out(range(101), frames, World(rank=rank, size=4)) for rank in range(4)]
    assert sorted(i for share in shares for i in share) == list(range(101))
    loads = [int(frames[share].sum()) for share in shares]
    assert max(loads) - min(loads) < 50


def test_features_of_another_model_are_an_error_that_names_the_field(setup: script.Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    export = make_export(tmp_path / "run" / "export", FeatureSettings(low_hz=60.0))
    with pytest.raises(UserError, match=r"low_hz: 60.0 != 20.0"):
        evaluate(replace(setup, export=str(export)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_invalid_settings_are_refused_before_any_work(setup: script.Config, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    pretrained = make_export(tmp_path / "run" / "export", FeatureSettings(), kind="pretrained")
    with pytest.raises(UserError, match="not a recogniser: give the export of finetune_ctc.py or finetune_rnnt.py"):
        evaluate(replace(setup, export=str(pretrained)), tmp_path)
    with pytest.raises(UserError, match="no recording with split 'tset'"):
        evaluate(replace(setup, data=replace(setup.data, split="tset")), tmp_path)
    with pytest.raises(UserError, match="there is no export at"):
        evaluate(replace(setup, export=str(tmp_path / "nothing")), tmp_path)
    with pytest.raises(UserError, match="data.dataset is missing"):
        script.Config(export="x")
    features = FeatureSettings()
    with DatasetWriter(tmp_path / "without-text", features) as writer:
        writer.add(Recording("no-text", None, split="test"), np.zeros((50, features.num_mels), np.float32))
        writer.finish()
    with pytest.raises(UserError, match="1 of 1 recordings have no transcript, such as 'no-text'"):
        evaluate(replace(setup, data=DataSettings(dataset=str(tmp_path / "without-text"))), tmp_path)


def test_an_unknown_field_ends_with_status_2_and_the_nearest_name(tmp_path: Path) -> None:
    command = [sys.executable, script.__file__, "--export", "x", "--data.datset", "y"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and "data.dataset" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid.contexts", "[5, 0]"], "grid.contexts: .*`python -m tools.sweep`"),
        (["--grid.exports", "[a]"], "grid.exports: .*`python -m tools.sweep`"),
        (["--inference.context_seconds", "[5, 0]"], "inference.context_seconds is a list: .*`python -m tools.sweep`"),
        (["--inference.overlap", "[0.5, 0]"], r"inference.overlap: .*\[0.5, 0\].*`python -m tools.sweep`"),
        (["--decoder", "[{beam: 1}, {beam: 8}]"], "decoder: (.|\n)*`python -m tools.sweep`"),
        (["--inference.contextseconds", "5"], "did you mean 'inference.context_seconds'"),
        (["--data.max_recordings", "-1"], "data.max_recordings is -1: expected an integer, 0 or more"),
        (["--threads", "-1"], "threads is -1: expected an integer, 0 or more"),
    ],
)
def test_lists_and_invalid_values_are_refused_naming_the_field(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        script.parse_command(["--export", "x", "--data.dataset", "y", *arguments])
    assert ("tools.sweep" in str(refused.value)) == ("tools.sweep" in message)


def test_a_grid_in_a_configuration_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("export: x\ndata: {dataset: y}\ngrid: {contexts: [5, 0]}\n")
    with pytest.raises(UserError, match="grid.*`python -m tools.sweep`"):
        script.parse_command(["--config", str(tmp_path / "grid.yaml")])


def test_the_error_about_missing_transcripts_names_a_dataset_in_object_storage(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, FeatureSettings()) as writer:
        writer.add(Recording("a", split="test"), np.zeros((10, 80)))
        writer.finish()
    dataset = open_dataset(tmp_path)
    dataset.location = "s3://bucket/data"
    with pytest.raises(UserError, match="s3://bucket/data: 1 of 1 recordings have no transcript"):
        evaluation.select_recordings(dataset, DataSettings("s3://bucket/data"))


def test_a_moved_dataset_is_not_decoded_again(setup: script.Config, tmp_path: Path, monkeypatch) -> None:
    first = evaluate(setup, tmp_path / "out")
    (tmp_path / "moved").symlink_to(setup.data.dataset, target_is_directory=True)
    monkeypatch.setattr(evaluation, "decode_recordings", None)
    assert (
        evaluate(replace(setup, data=replace(setup.data, dataset=str(tmp_path / "moved"))), tmp_path / "out") == first
    )
