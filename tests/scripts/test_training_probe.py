"""Probe during pretraining: it changes nothing in training, and is logged the same however the run is spread."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from bestrq.model.conformer import ConformerEncoder
from bestrq.pretraining.layer_features import Frames
from bestrq.training.stop import StopRequest
from common.config import parse
from common.errors import UserError
from pipelines import training_probe
from tests.gloo import run_distributed
from tests.tiny import DATA, ENCODER, RUN, make_dataset

DROPOUT = ["--encoder.dropout=0.5", "--encoder.convolution_norm=batch_norm"]
PROBE = ["--probe.every_steps=2", "--probe.steps=4", "--probe.minutes=0.3"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=60)


def arguments(dataset: Path, folder: Path, *more: str) -> list[str]:
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", "--data.num_workers=0"]
    few = ["--run.steps=5", "--quantizer.codebook_size=64", "--checkpoint.every_steps=1", "--validation.every_steps=0"]
    return [*ENCODER, *DATA, *RUN, *few, *places, *more]


def run(dataset: Path, folder: Path, *more: str) -> None:
    pretrain.train(parse(pretrain.Config, arguments(dataset, folder, *more)))


def run_in_world(world: Any, options: list[str]) -> None:
    pretrain.start_world = lambda settings: world  # type: ignore[assignment]
    pretrain.train(parse(pretrain.Config, options))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name} {key}": value
        for name in ("model", "optimizer", "extra")
        for key, value in load_file(folder / f"checkpoints/step-00000005/{name}.safetensors").items()
    }


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_training_is_the_same_bit_for_bit_with_and_without_the_probe(
    world_size: int, strategy: str, dataset: Path, tmp_path: Path
) -> None:
    """With dropout and batch norm: random numbers, running statistics and the training mode are left alone."""
    for name, probe in (("without", []), ("with", PROBE)):
        more = [*DROPOUT, *probe, f"--distributed.strategy={strategy}"]
        if world_size == 1:
            run(dataset, tmp_path / name, *more)
        else:
            run_distributed(run_in_world, world_size, arguments(dataset, tmp_path / name, *more))
    without, probed = tensors(tmp_path / "without"), tensors(tmp_path / "with")
    assert without.keys() == probed.keys()
    assert [name for name in without if not torch.equal(without[name], probed[name])] == []
    losses = [[line["loss"] for line in lines(tmp_path / name, "train")] for name in ("without", "with")]
    assert losses[0] == losses[1]
    assert lines(tmp_path / "without", "probe") == []
    assert [line["step"] for line in lines(tmp_path / "with", "probe")] == [2, 4, 5], "and at the end of the run"


STILL = ["--optimizer.learning_rate=1e-12", "--optimizer.warmup_steps=0"]


def test_figures_do_not_depend_on_the_number_of_processes_and_equal_the_random_encoders_at_the_start(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate of nearly nothing the encoder is the random one, so this also checks the baseline."""
    run(dataset, tmp_path / "one", *PROBE, *STILL)
    console = capsys.readouterr().out
    for strategy in ("ddp", "fsdp"):
        options = arguments(dataset, tmp_path / strategy, *PROBE, *STILL, f"--distributed.strategy={strategy}")
        run_distributed(run_in_world, 2, options)
    one = lines(tmp_path / "one", "probe")
    for strategy in ("ddp", "fsdp"):
        for line, other in zip(one, lines(tmp_path / strategy, "probe"), strict=True):
            assert other.pop("kind") == "probe"
            assert other == pytest.approx({name: value for name, value in line.items() if name != "kind"}, rel=1e-3)
    for line in one:
        assert line["probe_nats_per_character"] == pytest.approx(line["probe_nats_random"], rel=1e-3)
        assert line["effective_rank"] == pytest.approx(line["effective_rank_random"], rel=1e-3)
        assert line["frame_correlation"] == pytest.approx(line["frame_correlation_random"], rel=1e-3)
        assert line["probe_nats_log_mel"] != line["probe_nats_random"]
    assert "step 2/5  probe" in console and "log-mel" in console


def test_the_probed_copy_has_the_positions_of_the_current_stage(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, interpolations = training_probe.encode_layers, []

    def noted(encoder: ConformerEncoder, log_mel: Sequence[torch.Tensor]) -> list[Frames]:
        interpolations.append(encoder.settings.rotary_interpolation)
        return encode(encoder, log_mel)

    monkeypatch.setattr(training_probe, "encode_layers", noted)
    run(dataset, tmp_path / "run", *PROBE, "--curriculum=[{after_step: 2, row_frames: 400, rotary_interpolation: 4}]")
    assert interpolations == [1, 1, 4, 4], "the initial encoder, then steps 2, 4 and 5"


def test_a_resumed_run_logs_the_same_figures(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(dataset, tmp_path / "whole", *PROBE)
    with monkeypatch.context() as patch:
        answers = iter([False] * 3)
        patch.setattr(StopRequest, "noticed", lambda self: next(answers, True))
        run(dataset, tmp_path / "stopped", *PROBE)
    run(dataset, tmp_path / "stopped", *PROBE)
    assert lines(tmp_path / "stopped", "probe") == lines(tmp_path / "whole", "probe")


def test_the_probe_may_be_added_to_a_run_and_needs_transcripts(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run", "--run.steps=5")
    run(dataset, tmp_path / "run", *PROBE)  # finished: a probe is no other configuration
    with pytest.raises(UserError, match=r"probe.every_steps is 2: .*have a transcript"):
        run(dataset, tmp_path / "new", *PROBE, "--probe.minutes=0.001", "--probe.evaluation_minutes=0.001")
    with pytest.raises(UserError, match=r"probe.every_steps is 2: .*no recording with language 'xx'"):
        run(dataset, tmp_path / "new", *PROBE, "--probe.language=xx")
    assert not (tmp_path / "new").exists(), "before any work"


def test_collapsed_features_raise_alarms_once_they_are_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dataset: Path
) -> None:
    """All weights of the probed copy are 0, so its features are constant; the run itself is healthy."""
    gather = training_probe.gather_model
    collapsed = lambda *arguments: {name: 0 * tensor for name, tensor in gather(*arguments).items()}  # noqa: E731
    monkeypatch.setattr(training_probe, "gather_model", collapsed)
    run(dataset, tmp_path / "run", *PROBE, "--probe.alarm_after=4")
    alarms = [line for line in capsys.readouterr().err.splitlines() if "ALARM" in line]
    assert [line.split(":")[0] for line in alarms] == ["ALARM at step 4"] * 2, "each is printed once"
    assert "effective rank of 0.0" in alarms[0] and "hold no more text" in alarms[1]
