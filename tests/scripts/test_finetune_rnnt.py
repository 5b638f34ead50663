"""RNN-T fine-tuning end to end: it learns, its export works with every decoder, and errors name the setting."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluate
import finetune_ctc
import finetune_rnnt
from bestrq.training.process import World
from common.config import parse
from common.errors import UserError
from data.features import FeatureSettings
from data.format.writer import DatasetWriter
from data.recording import Recording
from tests.tiny import DATA, ENCODER, RUN
from tools import align

SMALL = ["--transducer.prediction=lstm", "--transducer.prediction_dim=32", "--transducer.joint_dim=32"]
CALM = ["--encoder.dropout=0", "--encoder.attention_dropout=0", "--data.num_workers=0", "--data.max_seconds=9"]
PLAIN = ["--spec_augment.num_freq_masks=0", "--spec_augment.num_time_masks=0", "--validation.split=train"]
WORDS = "ana bela cid dora".split()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recording with four words."""
    path = tmp_path_factory.mktemp("data") / "one"
    generator = np.random.default_rng(0)
    features = FeatureSettings()
    sounds = generator.normal(size=(len(WORDS), 50, features.num_mels)) * 2
    times = [(word, i / 2, (i + 1) / 2) for i, word in enumerate(WORDS)]
    with DatasetWriter(path, features) as writer:
        writer.add(
            Recording("said", " ".join(WORDS), times, language="en", split="train"),
            np.concatenate(list(sounds)).astype(np.float32),
        )
        writer.finish()
    return path


def train(script: Any, dataset: Path, folder: Path, *more: str) -> None:
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}"]
    script.train(parse(script.Config, [*ENCODER, *DATA, *RUN, *CALM, *PLAIN, *places, *more]))


STEPS = ["--run.steps=160", "--validation.every_steps=160", "--checkpoint.every_steps=160", "--run.log_every=40"]
RATE = ["--optimizer.learning_rate=1e-2", "--optimizer.warmup_steps=10", "--optimizer.clip_norm=1"]


@pytest.fixture(scope="module")
def hybrid(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on this recording only."""
    folder = tmp_path_factory.mktemp("hybrid") / "run"
    train(finetune_rnnt, dataset, folder, *SMALL, *STEPS, *RATE, "--transducer.ctc_weight=1")
    return folder


def decode(run: Path, dataset: Path, out: Path, *more: str) -> dict[str, Any]:
    places = [f"--export={run / 'export'}", f"--data.dataset={dataset}", f"--out={out}", "--data.split=train"]
    evaluate.evaluate(parse(evaluate.Config, [*places, "--device=cpu", "--resamples=100", *more]), World())
    return json.loads((out / "results.json").read_text())


def test_one_recording_is_learned_from_scratch_to_the_last_word(hybrid: Path) -> None:
    lines = [json.loads(line) for line in (hybrid / "metrics.jsonl").read_text().splitlines()]
    assert [line["dev_wer"] for line in lines if line["kind"] == "dev"] == [0.0]
    losses = [line["transducer_loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.1 < 2 < losses[0]


def test_a_transducer_with_durations_learns_it_too_and_passes_over_frames(dataset: Path, tmp_path: Path) -> None:
    train(finetune_rnnt, dataset, tmp_path / "run", *SMALL, *STEPS, *RATE, "--transducer.durations=[0,1,2,4]")
    [row] = decode(tmp_path / "run", dataset, tmp_path / "out")["recordings"]
    assert row["hypothesis"] == " ".join(WORDS)
    with pytest.raises(UserError, match=r"decoder.beam is 4, but the transducer of .* has durations"):
        decode(tmp_path / "run", dataset, tmp_path / "beam", "--decoder.beam=4")


def test_every_decoder_of_a_hybrid_agrees_on_what_it_has_learned(hybrid: Path, dataset: Path, tmp_path: Path) -> None:
    ways = {"rnnt": (), "ctc": ("--decoder.head=ctc",), "beam": ("--decoder.beam=4",)}
    ways["ctc beam"] = ("--decoder.head=ctc", "--decoder.beam=4")
    for name, options in ways.items():
        results = decode(hybrid, dataset, tmp_path / name, *options)
        assert [row["hypothesis"] for row in results["recordings"]] == [" ".join(WORDS)], name
        assert ("transducer" in results["decoder"]["description"]) == ("ctc" not in name)


def test_the_key_of_an_evaluation_tells_decoders_apart(hybrid: Path, dataset: Path, tmp_path: Path) -> None:
    first = decode(hybrid, dataset, tmp_path)
    assert decode(hybrid, dataset, tmp_path)["key"] == first["key"]
    assert decode(hybrid, dataset, tmp_path, "--decoder.max_symbols=3")["key"] != first["key"]


def test_the_ctc_head_of_a_hybrid_aligns(hybrid: Path, dataset: Path, tmp_path: Path) -> None:
    options = [f"--model={hybrid / 'export'}", f"--data.dataset={dataset}", f"--words={tmp_path / 'words.jsonl'}"]
    align.align(parse(align.Config, [*options, "--device=cpu", "--realign=true"]), World())
    [line] = (tmp_path / "words.jsonl").read_text().splitlines()
    found = json.loads(line)["words"]
    assert [word["word"] for word in found] == WORDS
    assert all(abs(word["start"] - i / 2) < 0.5 for i, word in enumerate(found))


def test_heads_that_an_export_has_not_are_refused_by_name(hybrid: Path, dataset: Path, tmp_path: Path) -> None:
    train(finetune_ctc, dataset, tmp_path / "ctc", "--run.steps=1")
    train(finetune_rnnt, dataset, tmp_path / "rnnt", *SMALL, "--run.steps=1")
    with pytest.raises(UserError, match=r"decoder.head is 'rnnt', but .* has only a CTC model"):
        decode(tmp_path / "ctc", dataset, tmp_path / "out", "--decoder.head=rnnt")
    with pytest.raises(UserError, match=r"a transducer without a CTC head"):
        decode(tmp_path / "rnnt", dataset, tmp_path / "out", "--decoder.head=ctc")
    with pytest.raises(UserError, match=r"decoder.language_model is given, but decoder.beam is 1"):
        decode(hybrid, dataset, tmp_path / "out", "--decoder.language_model=lm.arpa")
    with pytest.raises(UserError, match=r"decoder.language_model is .*none.arpa: no such file"):
        decode(hybrid, dataset, tmp_path / "out", "--decoder.beam=2", f"--decoder.language_model={tmp_path}/none.arpa")
    assert not (tmp_path / "out").exists()
