"""Alarms of pretraining: each planted failure fires within few steps of a real run, and a healthy run is silent."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pretrain
from bestrq.pretraining.alarms import MAX_ROWS, REPEAT, Alarm, Alarms, feature_alarms, probe_alarms
from common.config import parse
from common.segments import Segments
from data.features import FeatureSettings
from data.format.writer import DatasetWriter
from data.recording import Recording
from tests.tiny import DATA, ENCODER, RUN, make_dataset

STEPS = 12


def speech_like(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Log-mel with the continuity of speech in time and over bins: smoothed noise around a spectrum."""
    smooth = np.apply_along_axis(np.convolve, 0, rng.normal(size=(frames + 24, 80)), np.hanning(26)[1:-1], "same")
    smooth = np.apply_along_axis(np.convolve, 1, smooth, np.ones(6), "same")[12:-12]
    return (2 * smooth + np.linspace(-9, -1, 80)).astype(np.float32)


def write(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    rng = np.random.default_rng(0)
    with DatasetWriter(path, FeatureSettings()) as writer:
        for number in range(30):
            log_mel = speech_like(rng, int(rng.integers(120, 300)))
            writer.add(Recording(f"r{number:02d}", split="train"), np.ascontiguousarray(change(log_mel)))
        writer.finish()
    return path


def alarms_of(dataset: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    """Lines with an alarm on stderr of a run of `STEPS` steps."""
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", "--data.num_workers=0", f"--run.steps={STEPS}"]
    fixed = ["--quantizer.codebook_size=64", "--optimizer.warmup_steps=2", "--masking.span_ms=200"]
    pretrain.train(parse(pretrain.Config, [*ENCODER, *DATA, *RUN, *fixed, *places, *more]))
    return [line for line in capsys.readouterr().err.splitlines() if "ALARM" in line]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "healthy", lambda log_mel: log_mel)


def test_healthy_runs_are_silent(healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = ["--probe.every_steps=6", "--probe.steps=10", "--probe.alarm_after=100"]
    assert alarms_of(healthy, tmp_path / "a", capsys) == []
    assert alarms_of(make_dataset(tmp_path / "words"), tmp_path / "b", capsys, *probe) == []


FAILURES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], list[str], str]] = {
    "constant features": (lambda x: np.repeat(x[:1], len(x), axis=0), [], "features are constant"),
    "mel and time exchanged": (lambda x: x.T.reshape(x.shape), [], "neighbouring frames have a correlation of"),
    "all masked": (lambda x: x, ["--masking.start_probability=0.9"], "nothing is left to predict"),
    "none masked": (lambda x: x, ["--masking.span_ms=4000"], "no frame had a target"),
    "rate x 100": (lambda x: x, ["--optimizer.learning_rate=0.1"], "features collapse even if the loss stays finite"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_planted_failure_fires_within_few_steps_and_says_what_to_try(
    failure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, more, message = FAILURES[failure]
    lines = alarms_of(write(tmp_path / "data", change), tmp_path / "run", capsys, *more)
    assert any(message in line for line in lines), lines
    others = [line for line in lines if message not in line]
    assert all("codebook has collapsed" in line for line in others) and (not others or failure == "constant features")


def segments_of(length: int) -> Segments:
    return Segments(torch.tensor([[0]]), torch.tensor([[length]]), length)


def test_feature_alarms_use_the_segments_of_the_first_rows() -> None:
    rng = np.random.default_rng(0)
    row = torch.zeros(400, 80)
    row[:200] = torch.from_numpy(speech_like(rng, 200))
    row[:200] = (row[:200] - row[:200].mean(0)) / row[:200].std(0)
    rows = torch.stack([row] * MAX_ROWS + [torch.zeros_like(row)] * 9)
    segments = Segments(torch.zeros(len(rows), 1).long(), torch.full((len(rows), 1), 200), 400)
    assert list(feature_alarms(rows, segments)) == []
    assert [alarm.name for alarm in feature_alarms(rows.flip(0), segments)] == ["features: constant"]
    shuffled = row[torch.from_numpy(rng.permutation(200))][None]
    assert [alarm.name for alarm in feature_alarms(shuffled, segments_of(200))] == ["features: axis"]


VALUES = {
    "mask_share": 0.3, "targets_seen": 5000, "perplexity": 500.0, "loss": 5.0, "accuracy": 0.02,
    "unigram_entropy": 6.5, "unigram_accuracy": 0.01, "learning_rate": 2e-3,
}  # fmt: skip


def fired(step: int = 5000, codebook_size: int = 1000, **changed: float) -> list[str]:
    alarms = Alarms(codebook_size, warmup_steps=1000)
    log_mel = torch.from_numpy(speech_like(np.random.default_rng(0), 300))[None]
    model = nn.Linear(100, 100)  # weights of 0.058
    return [alarm.name for alarm in alarms.report(step, VALUES | changed, log_mel, segments_of(300), model)]


def test_loss_alarms_have_the_limits_that_they_state() -> None:
    assert fired() == []
    assert fired(perplexity=9.0) == ["targets: collapse"] and fired(perplexity=9.0, targets_seen=999) == []
    small = {"codebook_size": 30, "loss": 0.1, "accuracy": 0.99, "unigram_entropy": 0.2}
    assert fired(**small, perplexity=1.2) == ["targets: collapse"] and fired(**small, perplexity=9.0) == []
    assert fired(loss=8.0) == ["loss: divergence"] and fired(loss=7.8, step=10) == []
    assert fired(learning_rate=0.02) == ["loss: rate"] and fired(learning_rate=0.01) == []
    worse = {"loss": 6.6, "accuracy": 0.009}
    assert fired(**worse) == ["loss: unigram"]
    assert fired(step=1500, **worse) == [], "early in training"
    assert fired(loss=6.6) == [] and fired(accuracy=0.009) == [], "one of both shows that the context is used"


def test_a_high_loss_directly_after_new_targets_is_no_divergence() -> None:
    """In a run with quantizer.pca_steps 200, the loss was 7.7 nats at step 201, and 6.2 are those of guessing."""
    alarms = Alarms(500, warmup_steps=200, new_targets_at=(0, 200, 400))
    steps = (1, 100, 200, 201, 300, 301, 401, 500, 501)
    fired = [step for step in steps if any(alarms.loss_alarms(step, VALUES | {"loss": 7.7, "targets_seen": step}))]
    assert fired == [1, 100, 200, 301, 501]


PROBE = {
    "effective_rank": 8.0, "effective_rank_random": 12.0, "frame_correlation": 0.7, "probe_nats_per_character": 2.5,
    "probe_nats_log_mel": 2.6, "probe_nats_random": 2.59,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"effective_rank": 2.9}, "probe: rank"),
        ({"effective_rank": 1.9, "effective_rank_random": 3.0}, "probe: rank"),
        ({"effective_rank": float("nan")}, "probe: rank"),
        ({"frame_correlation": 0.96}, "probe: slow"),
        ({"probe_nats_per_character": 2.595}, "probe: no gain"),
        ({"probe_nats_per_character": float("nan")}, "probe: no gain"),
    ],
)
def test_probe_alarms_fire_on_poor_features(changed: dict[str, float], name: str) -> None:
    assert list(probe_alarms(PROBE, judge=True)) == []
    assert [alarm.name for alarm in probe_alarms(PROBE | changed, judge=True)] == [name]
    assert list(probe_alarms(PROBE | changed, judge=False)) == []


def test_an_alarm_that_goes_on_is_repeated_rarely_and_one_that_returns_is_printed_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alarms = Alarms(1000, 0)
    low = [Alarm("loss: x", "low")]
    for step in range(REPEAT + 1):
        alarms.print_alarms(step, low, ("loss",))
        alarms.print_alarms(step, [], ("probe",))
    assert capsys.readouterr().err.splitlines() == ["ALARM at step 0: low", f"ALARM at step {REPEAT}: low"]
    alarms.print_alarms(200, [], ("loss",))
    alarms.print_alarms(201, low, ("loss",))
    assert capsys.readouterr().err == "ALARM at step 201: low\n"
