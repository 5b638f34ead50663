"""Held-out loss of pretraining: it changes nothing in training, and is the same however the run is spread."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from bestrq.training.stop import StopRequest
from common.config import parse
from common.errors import UserError
from tests.gloo import run_distributed
from tests.tiny import DATA, ENCODER, RUN, make_dataset

DROPOUT = ["--encoder.dropout=0.5", "--encoder.convolution_norm=batch_norm"]
STILL = ["--optimizer.learning_rate=1e-12", "--optimizer.warmup_steps=0"]
EVERY_STEP = ["--validation.every_steps=1"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=60)


def arguments(dataset: Path, folder: Path, *more: str) -> list[str]:
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", "--data.num_workers=0"]
    return [*ENCODER, *DATA, *RUN, "--run.steps=3", "--quantizer.codebook_size=64", *places, *more]


def run(dataset: Path, folder: Path, *more: str) -> None:
    pretrain.train(parse(pretrain.Config, arguments(dataset, folder, *more)))


def run_in_world(world: Any, options: list[str]) -> None:
    pretrain.start_world = lambda settings: world  # type: ignore[assignment]
    pretrain.train(parse(pretrain.Config, options))


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def tensors(folder: Path, step: int = 3) -> dict[str, torch.Tensor]:
    names = ("model", "optimizer", "extra")
    checkpoint = folder / f"checkpoints/step-{step:08d}"
    return {f"{name} {key}": value for name in names
            for key, value in load_file(checkpoint / f"{name}.safetensors").items()}  # fmt: skip


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_a_checkpoint_is_the_same_bit_for_bit_with_and_without_validation(
    world_size: int, strategy: str, dataset: Path, tmp_path: Path
) -> None:
    """With dropout and batch norm: random numbers, running statistics and the training mode are left alone."""
    for every in (0, 1):
        more = [*DROPOUT, f"--validation.every_steps={every}", f"--distributed.strategy={strategy}"]
        options = arguments(dataset, tmp_path / str(every), *more, "--checkpoint.every_steps=1")
        if world_size == 1:
            run(dataset, tmp_path / str(every), *more, "--checkpoint.every_steps=1")
        else:
            run_distributed(run_in_world, world_size, options)
    assert_identical(tensors(tmp_path / "0"), tensors(tmp_path / "1"))
    losses = [[line["loss"] for line in lines(tmp_path / name, "train")] for name in ("0", "1")]
    assert losses[0] == losses[1]
    assert lines(tmp_path / "0", "dev") == [] and len(lines(tmp_path / "1", "dev")) == 3


def test_the_held_out_loss_is_that_of_the_same_masks_at_every_step_and_without_dropout(
    dataset: Path, tmp_path: Path
) -> None:
    """At a learning rate of nearly nothing, so that only other masks, noise or dropout could change it."""
    run(dataset, tmp_path / "run", "--encoder.dropout=0.5", *STILL, *EVERY_STEP)
    dev = lines(tmp_path / "run", "dev")
    assert [line["step"] for line in dev] == [1, 2, 3]
    assert [line["dev_loss"] for line in dev] == pytest.approx([dev[0]["dev_loss"]] * 3, rel=1e-6)
    training = [line["loss"] for line in lines(tmp_path / "run", "train")]
    assert max(training) - min(training) > 1e-3, "other crops, masks and dropout in training"
    assert 0 <= dev[0]["dev_accuracy"] < 0.2 and 3 < dev[0]["dev_loss"] < 7


@pytest.mark.parametrize(
    ("world_size", "more"),
    [(1, ["--accumulation=4"]), (1, ["--data.num_workers=2"]), (2, []), (2, ["--distributed.strategy=fsdp"]),
     (4, ["--distributed.strategy=fsdp"])],
    ids=["accumulation", "workers", "ddp", "fsdp", "fsdp of 4"],
)  # fmt: skip
def test_the_held_out_loss_is_the_same_however_the_run_is_spread(
    world_size: int, more: list[str], dataset: Path, tmp_path: Path
) -> None:
    """Only the order of sums differs, at weights that do not move. 11 s are three rows: an odd number for 2 and 4."""
    fixed = [*STILL, *EVERY_STEP, "--validation.max_seconds=11"]
    run(dataset, tmp_path / "one", *fixed)
    if world_size == 1:
        run(dataset, tmp_path / "spread", *fixed, *more)
    else:
        run_distributed(run_in_world, world_size, arguments(dataset, tmp_path / "spread", *fixed, *more))
    one, spread = (lines(tmp_path / name, "dev") for name in ("one", "spread"))
    assert len(one) == len(spread) == 3
    for name in ("dev_loss", "dev_accuracy"):
        assert [line[name] for line in spread] == pytest.approx([line[name] for line in one], rel=1e-6)


def test_a_resumed_run_validates_as_the_uninterrupted_one_and_a_stop_adds_no_validation(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ["--validation.every_steps=2", "--run.steps=5"]
    run(dataset, tmp_path / "whole", *every)
    with monkeypatch.context() as patch:
        answers = iter([False] * 3)
        patch.setattr(StopRequest, "noticed", lambda self: next(answers, True))
        run(dataset, tmp_path / "stopped", *every)
    assert [line["step"] for line in lines(tmp_path / "stopped", "dev")] == [2]
    run(dataset, tmp_path / "stopped", *every)
    assert lines(tmp_path / "stopped", "dev") == lines(tmp_path / "whole", "dev")
    assert [line["step"] for line in lines(tmp_path / "whole", "dev")] == [2, 4, 5]


def test_a_share_of_the_recordings_is_validated_on_and_not_trained_on(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run", "--validation.share=0.2", *EVERY_STEP)
    assert len(lines(tmp_path / "run", "dev")) == 3
    with pytest.raises(UserError, match=r"validation.share was 0.2, is 0.0"):
        run(dataset, tmp_path / "run")
    with pytest.raises(UserError, match=r"validation.split is 'nowhere'"):
        run(dataset, tmp_path / "new", "--validation.split=nowhere")
    assert not (tmp_path / "new").exists()
