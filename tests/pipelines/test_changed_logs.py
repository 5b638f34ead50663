"""Changed logs and states from which commands continue: skipped or refused with file and field, nothing else."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import transcribe
from bestrq.training.averaging import Averages, AveragingSettings
from bestrq.training.checkpoint import Checkpoint, load_checkpoint
from bestrq.training.process import World
from bestrq.training.run_folder import RunFolder
from common.config import to_dict
from common.errors import UserError
from common.json_checks import read_number
from data.features import FeatureSettings
from data.skipped import read_list
from data.tokenizer import CharTokenizer, load_tokenizer
from experiments.jobs import Job, Records
from pipelines import finetuning, pretraining
from pipelines.probing import read_layer
from pipelines.pseudo_labels import Hypothesis, check_hypothesis
from pipelines.recording_log import RecordingLog
from pipelines.run_weights import dev_figures, read_run
from tests.saved_checkpoints import save_checkpoint
from tests.wrong_json import refused, variants
from tools import gauge_correlation
from tools.align import Results

KEY = "k" * 16
ALIGNED = {"number": 1, "words": [["a", 0.0, 0.5, 0.9], ["b", 0.5, 1.0, 0.0]], "cost": 0.1}
UNALIGNED = {"number": 1, "reason": "the transcript is empty"}
LABELLED = {"number": 1, **Hypothesis("a", [], 0.5, 0.5).to_dict(), "words": [["a", 0.0, 0.5, None]]}


@pytest.mark.parametrize("valid", [ALIGNED, UNALIGNED])
def test_changed_lines_of_an_alignment_are_aligned_again(valid: dict[str, Any], tmp_path: Path) -> None:
    path, read = tmp_path / f"{KEY}-00000.jsonl", 0
    for case, text in variants(valid):
        path.write_text(text + "\n" + json.dumps({**ALIGNED, "number": 0}) + "\n")

        def check() -> int:
            results = Results(tmp_path, KEY, 3)
            assert results.has(0) and results[0]["words"] == ALIGNED["words"]
            for i in range(3):  # what tools/align.py does with a result
                if results.has(i) and "reason" not in results[i]:
                    assert sum(word[3] for word in results[i]["words"]) >= 0
                    assert all(word[2] + word[1] >= 0 and word[0].encode() is not None for word in results[i]["words"])
                elif results.has(i):
                    assert results[i]["reason"].split(":")
            return results.has(1)

        assert not refused(check, case, "")
        read += check()
    assert 0 < read < 200


def test_changed_lines_of_pseudo_labels_are_decoded_again(tmp_path: Path) -> None:
    path, read = tmp_path / f"{KEY}-00000.jsonl", 0
    for case, text in variants(LABELLED):
        path.write_text(text + "\n")

        def check() -> int:
            log = RecordingLog(tmp_path, KEY, 3, check_hypothesis)
            hypotheses = [Hypothesis.from_dict(log[i]) for i in range(3) if log.has(i)]
            assert all(hypothesis.label + hypothesis.word >= 0 for hypothesis in hypotheses)
            return len(hypotheses)

        assert not refused(check, case, "")
        read += check()
    assert 0 < read < 100
    path.write_text(json.dumps({**LABELLED, "number": -1}) + "\n" + json.dumps({**LABELLED, "number": 3}) + "\n")
    assert not any(RecordingLog(tmp_path, KEY, 3, check_hypothesis).has(i) for i in range(3))
    path.write_bytes(b"[" * 100_000 + b"\n" + json.dumps(LABELLED).encode())
    assert RecordingLog(tmp_path, KEY, 3, check_hypothesis).has(1)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        RecordingLog(tmp_path, KEY, 3, check_hypothesis)


def test_changed_states_of_transcriptions_and_lists_of_skipped_recordings_are_skipped(tmp_path: Path) -> None:
    for case, text in variants({"name": "x", "key": "k", "reason": "r"}):
        (tmp_path / "transcribed-00001.jsonl").write_text(text)
        assert not refused(lambda: transcribe.collect_state(tmp_path), case, "")
        (tmp_path / transcribe.STATE).unlink()
        (tmp_path / "skipped.jsonl").write_text(text.replace('"name"', '"id"'))
        assert not refused(lambda: [i.kind for i in read_list(tmp_path / "skipped.jsonl", {"x"})], case, "")


def test_changed_states_of_a_checkpoint_are_refused_with_the_field(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    position = {"epoch": 0, "block": 0, "row": 3, "dataset": "f", "order": {"seed": 0}}
    state = {"data": position, "best": {"rate": 0.5, "step": 2}, "averaged_updates": 3, "precision": "float32"}
    path = save_checkpoint(tmp_path, 3, model, optimizer, state, World())
    averages = Averages(AveragingSettings(ema_decay=0.5), model, tmp_path, [3], World())
    averages.average = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    moving = {f"average/{name}": tensor for name, tensor in averages.average.items()}
    document = json.loads((path / "state.json").read_text())
    count = 0
    for case, text in variants(document):
        (path / "state.json").write_text(text)

        def load() -> None:
            checkpoint = load_checkpoint(path, None, None, World())
            finetuning.restored(checkpoint)
            averages.load(Checkpoint(path, checkpoint.step, checkpoint.state, moving))

        count += refused(load, case, "")
    assert count > 150


def test_a_pretraining_checkpoint_without_its_tensors_is_refused(tmp_path: Path) -> None:
    config = pretraining.Config()
    quantizer = pretraining.RandomProjectionQuantizer(config.quantizer, 320)
    model = torch.nn.Linear(2, 1)
    counts = torch.zeros(1, 4, dtype=torch.int64)
    state = pretraining.RunState(model, torch.optim.AdamW(model.parameters()), quantizer, counts)
    position = {"epoch": 0, "block": 0, "row": 3, "dataset": "f", "order": {}}
    stored = {f"quantizer.{name}": tensor for name, tensor in quantizer.state_dict().items()}
    valid = {**stored, "code_counts": counts}
    pretraining.resume(state, Checkpoint(tmp_path, 3, {"data": position}, valid), World())
    for name in valid:
        partial = {other: tensor for other, tensor in valid.items() if other != name}
        with pytest.raises(UserError, match=str(tmp_path)):
            pretraining.resume(state, Checkpoint(tmp_path, 3, {"data": position}, partial), World())
    with pytest.raises(UserError, match="counts of the codes"):
        wrong = {**valid, "code_counts": torch.zeros(3)}
        pretraining.resume(state, Checkpoint(tmp_path, 3, {"data": position}, wrong), World())
    with pytest.raises(UserError, match="state of the data"):
        pretraining.resume(state, Checkpoint(tmp_path, 3, {}, valid), World())


def test_changed_files_of_a_run_folder_are_refused_by_name_or_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    config = finetuning.FinetuneConfig()
    run = RunFolder(tmp_path)
    values, start = to_dict(config), {"time": "t", "fingerprints": {"dataset": "f"}}
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    for case, text in variants({"starts": [start]}):
        run.record.write_text(text)
        refused(lambda: run.start(config, World(), fingerprints={"dataset": "f"}), case, "run")
        run.close()
        (tmp_path / "config.yaml").write_text(json.dumps(values))
    run.record.unlink()
    count = 0
    for case, text in variants(values, 150):
        (tmp_path / "config.yaml").write_text(text)
        count += refused(lambda: read_run(tmp_path), case, str(tmp_path))

        def resume() -> None:
            run.start(config, World())

        refused(resume, case, "")
        run.close()
        run.record.unlink(missing_ok=True)
    assert count > 15
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    for case, text in variants({"step": 3, "kind": "dev", "dev_wer": 0.5, "dev_cer": 0.2}):
        run.metrics.write_text(text)
        assert not refused(lambda: dev_figures(read_run(tmp_path)), case, "")


def test_changed_tokenizers_records_and_results_of_probes_are_refused_by_name_or_read(tmp_path: Path) -> None:
    CharTokenizer(list(" abc")).save(tmp_path)
    for case, text in variants(json.loads((tmp_path / "tokenizer.json").read_text())):
        (tmp_path / "tokenizer.json").write_text(text)

        def use() -> None:
            tokenizer = load_tokenizer(tmp_path)
            assert len(tokenizer.pieces) == tokenizer.vocab_size
            tokenizer.decode(tokenizer.encode("a"))

        refused(use, case, "")
    (tmp_path / "tokenizer.json").write_text('{"kind": "bpe"}')
    (tmp_path / "tokenizer.model").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"tokenizer.model: not a regular file"):
        load_tokenizer(tmp_path)

    records, job = Records(tmp_path), Job("x", ("a",), tmp_path / "output")
    valid = {"state": "done", "key": "k", "attempts": 1, "processor_seconds": 2.0, "wall_seconds": 1.0, "problem": ""}
    records.path(job).parent.mkdir()
    for case, text in variants(valid):
        records.path(job).write_text(text)
        refused(lambda: (records.is_done(job), records.processor_seconds(job)), case, str(records.path(job)))

    rates = {"errors": [1.0, 0.5], "sizes": [2, 3]}
    layer = {"train_nats": 1.0, "layer_weights": [], "nats": rates, "phone": {**rates, "chance": 0.5}}
    for case, text in variants(layer):
        (tmp_path / "0.json").write_text(text)
        refused(lambda: read_layer(tmp_path / "0.json")["train_nats"] + 1, case, "0.json")
    for case, text in variants({"scores": {"all": {"cer": 0.5}}}):
        (tmp_path / "x.json").write_text(text)
        refused(lambda: read_number(tmp_path / "x.json", "scores", "all", "cer"), case, "x.json")


def test_changed_figures_of_the_gauge_and_error_rates_are_refused_by_name_or_read(tmp_path: Path) -> None:
    gauge = {"targets": {f"t{k}": {"entropy": 1.0 + k, "pnmi": 0.1 * k, "seconds": 1} for k in range(8)}}
    rates = {f"t{k}": 0.1 * k for k in range(8)}
    paths = {"gauge": tmp_path / "gauge.json", "cer": tmp_path / "cer.json"}
    arguments = [f"--gauge={paths['gauge']}", f"--cer={paths['cer']}", "--resamples=100"]
    for name, valid in (("gauge", gauge), ("cer", rates)):
        paths["gauge"].write_text(json.dumps(gauge))
        paths["cer"].write_text(json.dumps(rates))
        for case, text in variants(valid, 150):
            paths[name].write_text(text)
            refused(lambda: gauge_correlation.main(arguments), case, "")


def test_settings_of_features_in_a_checkpoint_are_checked() -> None:
    for case, text in variants(FeatureSettings().to_dict()):
        refused(partial(FeatureSettings.from_dict, json.loads(text)), case, "")
