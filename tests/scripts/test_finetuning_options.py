"""Options of fine-tuning in the real scripts: frozen and fresh parameters, averages, masks, augmentation, resuming."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.training.checkpoint import list_checkpoints
from bestrq.training.process import World
from bestrq.training.stop import StopRequest
from common.config import parse
from common.errors import UserError
from tests.gloo import run_distributed
from tests.tiny import DATA, ENCODER, RUN, make_dataset

SCRIPTS = {"pretrain": pretrain, "finetune_ctc": finetune_ctc, "finetune_rnnt": finetune_rnnt}
SMALL = {
    "pretrain": ["--quantizer.codebook_size=64", "--encoder.num_layers=3"],
    "finetune_ctc": ["--finetune.tokenizer=char"],
    "finetune_rnnt": ["--transducer.prediction_dim=12", "--transducer.joint_dim=10", "--transducer.ctc_weight=0.3"],
}
# All options at once: 1 of 3 blocks left out, 1 of the other 2 re-initialised, the rest frozen for two steps.
START = ["--finetune.drop_top_blocks=1", "--finetune.reinitialise_top_blocks=1", "--finetune.freeze_encoder_steps=2"]
OPTIONS = [
    *START, "--finetune.encoder_learning_rate=3e-3", "--finetune.layer_decay=0.7", "--encoder.output=weighted_sum",
    "--optimizer.schedule=tri_stage", "--hidden_masks.time_prob=0.3", "--hidden_masks.channel_prob=0.3",
    "--hidden_masks.channel_length=4", "--spec_augment.time_masks_per_frame=0.02", "--data.augment.speed=0.1",
    "--data.augment.frequency_warp=0.1", "--averaging.ema_decay=0.9", "--averaging.last=2",
    "--validation.every_steps=2", "--checkpoint.keep_last=9",
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


def arguments(script: str, dataset: Path, folder: Path, *more: str) -> list[str]:
    rate = ["--optimizer.learning_rate=1e-2", "--optimizer.warmup_steps=1", "--run.steps=5", "--data.num_workers=0"]
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}"]
    return [*ENCODER, *DATA, *RUN, *SMALL[script], *rate, *places, *more]


def run(script: str, dataset: Path, folder: Path, *more: str) -> None:
    module: Any = SCRIPTS[script]
    module.train(parse(module.Config, arguments(script, dataset, folder, *more)))


@pytest.fixture(scope="module")
def pretrained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    run("pretrain", dataset, folder, "--run.steps=1")
    return folder / "export"


@pytest.fixture(scope="module")
def finished(dataset: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {script: tmp_path_factory.mktemp("runs") / script for script in ("finetune_ctc", "finetune_rnnt")}
    for script, folder in folders.items():
        run(script, dataset, folder, f"--finetune.init={pretrained}", *OPTIONS)
    return folders


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: model, optimizer and average."""
    path = dict(list_checkpoints(folder / "checkpoints"))[step]
    parts = {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer", "extra")}
    return {f"{part} {name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
def test_frozen_steps_keep_the_kept_weights_and_train_all_others(
    script: str, pretrained: Path, finished: dict[str, Path]
) -> None:
    """After two frozen steps and after five: bit for bit the export's weights, without optimizer state and decay."""
    export = load_file(pretrained / "model.safetensors")
    frozen, trained = checkpoint(finished[script], 2), checkpoint(finished[script], 5)
    kept = [name for name in export if name.startswith(("encoder.subsampling.", "encoder.blocks.0."))]
    assert kept and not any("blocks.2" in name for name in trained)
    for name in kept:
        assert torch.equal(frozen[f"model {name}"], export[name]), name
        assert f"optimizer exp_avg/{name}" not in frozen and f"optimizer exp_avg/{name}" in trained
        assert torch.equal(frozen[f"extra average/{name}"], export[name])
    moved = [name for name in kept if not torch.equal(trained[f"model {name}"], export[name])]
    assert len(moved) > len(kept) / 2
    fresh = [name for name in frozen if name.startswith(("model encoder.blocks.1.", "model encoder.layer_sum"))]
    for name in fresh:
        parameter = name.removeprefix("model ")
        assert f"optimizer exp_avg/{parameter}" in frozen
        assert (
            parameter not in export or not torch.equal(frozen[name], export[parameter]) or not export[parameter].any()
        )


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
@pytest.mark.parametrize("stops", [(1, 1), (3,), (4,)])
def test_an_interrupted_run_with_all_options_continues_bit_for_bit(
    script: str, stops: tuple[int, ...], dataset: Path, pretrained: Path, finished: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for steps in stops:
        with monkeypatch.context() as patch:
            answers = iter([False] * steps)
            patch.setattr(StopRequest, "noticed", lambda self, answers=answers: next(answers, True))
            run(script, dataset, tmp_path / "run", f"--finetune.init={pretrained}", *OPTIONS)
    run(script, dataset, tmp_path / "run", f"--finetune.init={pretrained}", *OPTIONS, "--data.num_workers=1")
    first, second = checkpoint(tmp_path / "run", 5), checkpoint(finished[script], 5)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    a, b = (load_file(folder / "export/model.safetensors") for folder in (tmp_path / "run", finished[script]))
    assert all(torch.equal(a[name], b[name]) for name in b)
    results = [[line for line in lines(f) if line["kind"] != "train"] for f in (tmp_path / "run", finished[script])]
    assert [[(line["step"], line["kind"], line["dev_cer"]) for line in found] for found in results[:1]] == [
        [(line["step"], line["kind"], line["dev_cer"]) for line in found] for found in results[1:]
    ]


def test_the_end_has_the_mean_of_the_last_validations_and_the_export_the_best_of_all(finished: dict[str, Path]) -> None:
    for folder in finished.values():
        dev = [(line["step"], line["kind"]) for line in lines(folder) if line["kind"].startswith("dev")]
        assert dev == [(2, "dev"), (4, "dev"), (5, "dev"), (5, "dev_average")]
        rates = [line["dev_wer"] for line in lines(folder) if line["kind"].startswith("dev")]
        config = json.loads((folder / "export/config.json").read_text())
        assert config["dev_wer"] == min(rates)
        stored = [load_file(path) for path in sorted((folder / "averaging").iterdir())]
        assert len(stored) == 2
        ema = {name: checkpoint(folder, 5)[f"extra average/{name}"] for name in stored[1]}
        assert all(torch.equal(stored[1][name], ema[name]) for name in ema)


def run_in_world(world: World, script: str, options: list[str]) -> None:
    module: Any = SCRIPTS[script]
    module.start_world = lambda settings: world
    module.train(parse(module.Config, options))


CALM = ["--encoder.dropout=0", "--encoder.attention_dropout=0"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_losses_of_a_run_with_all_options_do_not_depend_on_the_processes(
    strategy: str, dataset: Path, pretrained: Path, tmp_path: Path
) -> None:
    """Frozen steps, fresh blocks, weighted sum, masks, augmentation and averages, in float32: a relative 2e-4."""
    options = [f"--finetune.init={pretrained}", *OPTIONS, *CALM]
    run("finetune_ctc", dataset, tmp_path / "one", *options)
    spread = [*options, f"--distributed.strategy={strategy}"]
    run_distributed(run_in_world, 2, "finetune_ctc", arguments("finetune_ctc", dataset, tmp_path / "two", *spread))
    losses = [[line["loss"] for line in lines(tmp_path / name) if line["kind"] == "train"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    one, two = (checkpoint(tmp_path / name, 5) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_an_export_with_a_weighted_sum_is_evaluated(dataset: Path, finished: dict[str, Path], tmp_path: Path) -> None:
    for script, folder in finished.items():
        places = [f"--export={folder / 'export'}", f"--data.dataset={dataset}", f"--out={tmp_path / script}"]
        options = [*places, "--device=cpu", "--resamples=100", "--data.split=dev", "--inference.mode=whole"]
        evaluate.evaluate(parse(evaluate.Config, options), World())
        results = json.loads((tmp_path / script / "results.json").read_text())
        config = json.loads((folder / "export/config.json").read_text())
        assert results["recordings"] and config["encoder"]["output"] == "weighted_sum"


def test_the_weights_of_the_sum_are_kept_from_an_export_with_the_same_layers_only(
    dataset: Path, finished: dict[str, Path], tmp_path: Path
) -> None:
    stored = load_file(finished["finetune_ctc"] / "export/model.safetensors")["encoder.layer_sum.weight"]
    assert stored.any()
    init, steps = f"--finetune.init={finished['finetune_ctc'] / 'export'}", ["--run.steps=1"]
    still = [*steps, "--optimizer.learning_rate=1e-12"]
    run("finetune_ctc", dataset, tmp_path / "same", init, "--encoder.output=weighted_sum", *still)
    assert torch.allclose(checkpoint(tmp_path / "same", 1)["model encoder.layer_sum.weight"], stored, atol=1e-9)
    fewer = ["--encoder.num_layers=1", "--finetune.drop_top_blocks=1", "--encoder.output=weighted_sum"]
    run("finetune_ctc", dataset, tmp_path / "fewer", init, *fewer, *still)
    assert not checkpoint(tmp_path / "fewer", 1)["model encoder.layer_sum.weight"].round(decimals=9).any()
    run("finetune_ctc", dataset, tmp_path / "last", init, *still)
    assert "model encoder.layer_sum.weight" not in checkpoint(tmp_path / "last", 1)


def test_blocks_left_out_must_add_up_to_those_of_the_export(dataset: Path, pretrained: Path, tmp_path: Path) -> None:
    init = f"--finetune.init={pretrained}"
    with pytest.raises(UserError, match=r"num_layers is 2, in the export 3, of which finetune.drop_top_blocks .* 0"):
        run("finetune_ctc", dataset, tmp_path / "run", init)
    with pytest.raises(UserError, match=r"num_layers is 2, in the export 3, of which finetune.drop_top_blocks .* 2"):
        run("finetune_ctc", dataset, tmp_path / "run", init, "--finetune.drop_top_blocks=2")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
def test_masks_and_augmentation_reach_the_model(script: str, dataset: Path, tmp_path: Path) -> None:
    """Each option changes the loss of the first step, in which all other random numbers are equal."""
    options = {
        "none": ["--data.augment.speed=0"], "time": ["--hidden_masks.time_prob=0.5"],
        "channel": ["--hidden_masks.channel_prob=0.5", "--hidden_masks.channel_length=4"],
        "speed": ["--data.augment.speed=0.3"], "frequency": ["--data.augment.frequency_warp=0.3"],
        "spec": ["--spec_augment.time_masks_per_frame=0.05"],
    }  # fmt: skip
    losses = {}
    for name, option in options.items():
        run(script, dataset, tmp_path / name, *CALM, "--run.steps=1", *option)
        losses[name] = lines(tmp_path / name)[0]["loss"]
    assert len(set(losses.values())) == len(options), losses


@pytest.mark.parametrize("script", ["finetune_ctc", "finetune_rnnt"])
def test_spec_augment_begins_after_its_start_step(script: str, dataset: Path, tmp_path: Path) -> None:
    masks = ["--spec_augment.time_masks_per_frame=0.05"]
    options = {
        "never": ["--spec_augment.num_freq_masks=0", "--spec_augment.num_time_masks=0"],
        "late": [*masks, "--spec_augment.start_step=1"],
        "now": masks,
    }
    losses = {}
    for name, option in options.items():
        run(script, dataset, tmp_path / name, *CALM, "--run.steps=2", "--run.log_every=1", *option)
        losses[name] = [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
    assert losses["late"][0] == losses["never"][0] != losses["now"][0]
    assert losses["late"][1] != losses["never"][1]
