"""Full pipeline for several kinds of encoder: pretraining, interruption, fine-tuning, evaluation."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evaluate
import finetune_ctc
import pretrain
from bestrq.training.process import World
from bestrq.training.stop import StopRequest
from common.config import parse
from tests.gloo import run_distributed
from tests.tiny import DATA, RUN, make_dataset

SMALL = {"dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "kernel_size": 5, "subsampling_channels": 4}
KINDS = {
    "efficient": {
        **SMALL, "subsampling": "striding", "subsampling_factor": 2, "position": "relative", "norm": "rms_norm",
        "earlier_stages": [
            {"num_layers": 1, "dim": 8, "num_heads": 2, "feedforward_dim": 16, "group_size": 3},
            {"num_layers": 1, "dim": 12, "num_heads": 2, "feedforward_dim": 16},
        ],
    },
    "fast, batch norm": {
        **SMALL, "subsampling": "striding", "subsampling_factor": 8, "convolution_norm": "batch_norm",
        "num_kv_heads": 1,
    },
    "streaming": {
        **SMALL, "mask": "chunk", "chunk_size": 4, "left_chunks": 2, "dynamic_chunks": True, "causal_convolution": True,
        "feedforward": "swiglu", "position": "fourier", "layer_drop": 0.2,
    },
    "windowed, checkpointed": {
        **SMALL, "subsampling": "stacking", "mask": "window", "window": 8, "activation_checkpointing": "full",
        "backend": "flex", "attention_dropout": 0.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=20)


def options(kind: str, dataset: Path, folder: Path) -> list[str]:
    recipe = folder.parent / "encoder.yaml"
    recipe.write_text(yaml.safe_dump({"encoder": KINDS[kind]}))
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", "--data.num_workers=0", "--data.row_frames=432"]
    return ["--config", str(recipe), *DATA, *RUN, "--run.steps=4", *places]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export/model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_with_interruption_fine_tuning_and_evaluation(
    kind: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "interrupted"):
        config = parse(pretrain.Config, options(kind, dataset, tmp_path / name))
        if name == "interrupted":
            requests = iter([False, False])
            with monkeypatch.context() as stopping:
                stopping.setattr(StopRequest, "noticed", lambda self, requests=requests: next(requests, True))
                pretrain.train(config)
        pretrain.train(config)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "interrupted")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole), "the resumed run differs"

    fine_tuning = [*options(kind, dataset, tmp_path / "ctc"), f"--finetune.init={tmp_path / 'whole/export'}"]
    fine_tuning += ["--finetune.tokenizer=char", "--validation.every_steps=2"]
    finetune_ctc.train(parse(finetune_ctc.Config, fine_tuning))
    config = parse(
        evaluate.Config,
        [f"--export={tmp_path / 'ctc/export'}", f"--data.dataset={dataset}", f"--out={tmp_path / 'results'}"],
    )
    evaluate.evaluate(config, World())
    results = json.loads((tmp_path / "results/results.json").read_text())
    assert len(results["recordings"]) == 2 and results["scores"]


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def pretrain_in_world(world: World, arguments: list[str]) -> None:
    pretrain.start_world = lambda settings: world  # type: ignore[attr-defined]  # this process is already in a group
    pretrain.train(parse(pretrain.Config, arguments))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["fast, batch norm", "windowed, checkpointed"])
def test_two_processes_have_the_losses_of_one(kind: str, strategy: str, dataset: Path, tmp_path: Path) -> None:
    """Including batch norm, whose statistics cover the frames of both processes."""
    exact = ["--encoder.dropout=0", "--encoder.attention_dropout=0", f"--distributed.strategy={strategy}"]
    one, two = ([*options(kind, dataset, tmp_path / name), *exact] for name in ("one", "two"))
    pretrain.train(parse(pretrain.Config, one))
    run_distributed(pretrain_in_world, 2, two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
