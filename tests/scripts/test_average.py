"""tools/average.py and finetune.init on the checkpoints of real runs: exports, means, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import evaluate
import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.training.checkpoint import COMPLETE, list_checkpoints
from bestrq.training.export_reading import read_export
from bestrq.training.process import World
from common.config import parse
from common.errors import UserError
from common.files import crc32_of
from pipelines.recogniser import load_recogniser
from tests.tiny import DATA, ENCODER, RUN, make_dataset
from tools import average

SCRIPTS: dict[str, Any] = {"pretrain": pretrain, "ctc": finetune_ctc, "rnnt": finetune_rnnt}
STEPS = 4
EVERY_STEP = ["--validation.every_steps=1", "--checkpoint.every_steps=1", "--checkpoint.keep_last=9"]
OPTIONS = {
    "pretrain": [
        *("--quantizer.codebook_size=64", "--validation.share=0.2", "--encoder.num_layers=3"),
        "--curriculum=[{after_step: 3, row_frames: 800, max_seconds: 8, rotary_interpolation: 2}]",
    ],
    "ctc": ["--data.normalisation=dataset", "--encoder.convolution_norm=batch_norm"],
    "rnnt": [
        *("--transducer.prediction_dim=12", "--transducer.joint_dim=10", "--transducer.ctc_weight=0.3"),
        *("--finetune.tokenizer=bpe", "--finetune.vocab_size=24", "--averaging.ema_decay=0.5"),
    ],
}


def train(kind: str, dataset: Path, folder: Path, *more: str) -> Path:
    rate = ["--optimizer.learning_rate=1e-2", "--optimizer.warmup_steps=1", f"--run.steps={STEPS}"]
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", "--data.num_workers=0"]
    module = SCRIPTS[kind]
    module.train(parse(module.Config, [*ENCODER, *DATA, *RUN, *OPTIONS[kind], *rate, *EVERY_STEP, *places, *more]))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {kind: train(kind, dataset, folder / kind) for kind in SCRIPTS}


@pytest.fixture
def run(runs: dict[str, Path], request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Copy of a run that a test may damage."""
    return shutil.copytree(runs[request.param], tmp_path / "run")


def weights(run: Path, step: int, name: str = "model") -> dict[str, Tensor]:
    return load_file(dict(list_checkpoints(run / "checkpoints"))[step] / f"{name}.safetensors")


def set_dev(run: Path, rates: dict[int, Any], name: str) -> None:
    """Replace the dev figures by step."""
    rows = [{"step": step, "kind": "dev", name: rate} for step, rate in rates.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def store(run: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Replace the weights of a checkpoint, with correct checksums."""
    path = dict(list_checkpoints(run / "checkpoints"))[step]
    save_file(tensors, path / "model.safetensors")
    marker = json.loads((path / COMPLETE).read_text())
    size, file = (path / "model.safetensors").stat().st_size, path / "model.safetensors"
    marker["files"]["model.safetensors"] = {"bytes": size, "crc32": crc32_of(file)}
    (path / COMPLETE).write_text(json.dumps(marker))


@pytest.mark.parametrize("kind", ["pretrain", "ctc", "rnnt"])
def test_the_export_of_a_checkpoint_is_that_of_the_run_at_its_step(
    kind: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    """All files: weights (with averaging.ema_decay the moving average), settings, tokenizer or quantizer."""
    own = read_export(runs[kind] / "export")
    checkpoint = dict(list_checkpoints(runs[kind] / "checkpoints"))[own.config["step"]]
    average.main([str(checkpoint), "--out", str(tmp_path / "export")])
    export = read_export(tmp_path / "export")
    averaged = export.config.pop("averaged")
    assert averaged["steps"] == [own.config["step"]]
    assert export.config == own.config
    if kind == "pretrain":
        assert export.config["encoder"]["rotary_interpolation"] == 2  # of the last stage of the curriculum
    assert export.tensors.keys() == own.tensors.keys()
    assert all(torch.equal(export.tensors[name], own.tensors[name]) for name in own.tensors)
    others = {path.name for path in (runs[kind] / "export").iterdir()} - {"config.json", "README.md"}
    assert others == {path.name for path in (tmp_path / "export").iterdir()} - {"config.json", "README.md"}
    for name in others:
        assert (tmp_path / "export" / name).read_bytes() == (runs[kind] / "export" / name).read_bytes()


@pytest.mark.parametrize("kind", ["pretrain", "ctc", "rnnt"])
def test_a_mean_is_that_of_float64_and_counters_are_those_of_the_newest_step(
    kind: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    average.main([str(runs[kind]), "--last=3", "--weights=step", f"--out={tmp_path / 'mean'}"])
    mean = read_export(tmp_path / "mean")
    assert mean.config["averaged"]["steps"] == [2, 3, 4] and mean.config["step"] == 4
    assert "dev_wer" not in mean.config
    parts = [weights(runs[kind], step) for step in (2, 3, 4)]
    expected = {name for name in parts[0] if kind != "pretrain" or name.startswith("encoder.")}
    assert mean.tensors.keys() == expected
    counters = 0
    for name, tensor in mean.tensors.items():
        if tensor.is_floating_point():
            exact = sum(part[name].double() for part in parts) / 3
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, exact.float()) or (tensor.double() - exact).abs().max() < 1e-8
        else:
            counters += 1
            assert torch.equal(tensor, parts[-1][name]) and not torch.equal(tensor, parts[0][name])
    assert (counters > 0) == (kind == "ctc")  # batch_norm
    moved = [name for name in expected if not torch.equal(mean.tensors[name], parts[-1][name])]
    assert len(moved) > len(expected) / 2


@pytest.mark.parametrize(("run", "name"), [("pretrain", "dev_loss"), ("ctc", "dev_wer")], indirect=["run"])
def test_the_best_checkpoints_are_those_with_the_lowest_dev_figure_and_the_newer_of_equal_ones(
    run: Path, name: str, tmp_path: Path
) -> None:
    set_dev(run, {1: 0.3, 2: 0.1, 3: 0.3, 4: None}, name)
    average.main([str(run), "--best", "2", f"--out={tmp_path / 'mean'}"])
    config = read_export(tmp_path / "mean").config
    assert config["averaged"]["steps"] == [2, 3]
    assert config["averaged"]["choice"] == f"lowest {name} in metrics.jsonl"
    assert config["averaged"]["dev"] == [{name: 0.1}, {name: 0.3}]
    with pytest.raises(UserError, match=rf"has 4 checkpoints, of which 3 have a {name} in metrics.jsonl, not 4"):
        average.main([str(run), "--best", "4", f"--out={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="has 4 checkpoints, not 5: give fewer"):
        average.main([str(run), "--last", "5", f"--out={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="mean: already exists"):
        average.main([str(run), f"--out={tmp_path / 'mean'}"])
    assert [path.name for path in tmp_path.iterdir() if "mean" not in path.name] == ["run"]


@pytest.mark.parametrize("run", ["ctc"], indirect=True)
def test_an_export_without_the_runs_own_takes_the_statistics_of_the_dataset(run: Path, tmp_path: Path) -> None:
    expected = json.loads((run / "export/config.json").read_text())["statistics"]
    shutil.rmtree(run / "export")
    average.main([str(run), f"--out={tmp_path / 'export'}"])
    assert read_export(tmp_path / "export").config["statistics"] == expected
    record = json.loads((run / "run.json").read_text())
    record["starts"][-1]["fingerprints"]["dataset"] = "another"
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match="statistics are neither in an export .* nor in its dataset .* that of the run is another"
    ):
        average.main([str(run), f"--out={tmp_path / 'other'}"])


@pytest.mark.parametrize("run", ["ctc"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", r"step-00000003/model.safetensors: encoder\S+ has non-finite values"),
        ("shape", r"head.bias is float32 \[\d+\] in \S+step-00000003\S+, float32 \[\d+\] in \S+step-00000004"),
        ("missing", r"have different tensors, such as head.bias"),
        ("dtype", r"head.bias is float64"),
    ],
)
def test_weights_that_do_not_fit_each_other_or_are_not_finite_are_refused(
    run: Path, change: str, message: str, tmp_path: Path
) -> None:
    tensors = weights(run, 3)
    if change == "nan":
        next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = torch.nan
    elif change == "missing":
        del tensors["head.bias"]
    else:
        bias = tensors["head.bias"]
        tensors["head.bias"] = bias[:-1].clone() if change == "shape" else bias.double()
    store(run, 3, tensors)
    with pytest.raises(UserError, match=message):
        average.main([str(run), "--last=2", f"--out={tmp_path / 'mean'}"])
    assert not (tmp_path / "mean").exists()
    average.main([str(run), "--last=1", f"--out={tmp_path / 'mean'}"])


@pytest.mark.parametrize("run", ["ctc", "pretrain"], indirect=True)
def test_weights_that_do_not_fit_the_settings_and_damaged_checkpoints_are_refused(run: Path, tmp_path: Path) -> None:
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace("num_layers: ", "num_layers: 1000000"))
    with pytest.raises(UserError, match=r"does not fit \S+config.yaml: it has \d blocks instead of 1000000\d"):
        average.main([str(run), f"--out={tmp_path / 'export'}"])
    (run / "config.yaml").write_text(settings.replace("\n  dim: 16", "\n  dim: 32"))
    with pytest.raises(UserError, match=r"does not fit \S+config.yaml: "):
        average.main([str(run), f"--out={tmp_path / 'export'}"])
    (run / "config.yaml").write_text("encoder: 3")
    with pytest.raises(UserError, match=r"config.yaml: "):
        average.main([str(run), f"--out={tmp_path / 'export'}"])
    (run / "config.yaml").write_text(settings)
    newest = run / "checkpoints/step-00000004"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"step-00000004 cannot be used: .* does not match its checksum"):
        average.main([str(run), f"--out={tmp_path / 'export'}"])
    (newest / COMPLETE).unlink()  # its save was interrupted: not a checkpoint
    average.main([str(run), f"--out={tmp_path / 'export'}"])
    assert read_export(tmp_path / "export").config["step"] == 3
    with pytest.raises(UserError, match="give one of them"):
        average.main([str(run), "--last=2", "--best=2", f"--out={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="is one checkpoint: give the run folder"):
        average.main([str(run / "checkpoints/step-00000003"), "--last=2", f"--out={tmp_path / 'other'}"])


@pytest.mark.parametrize("kind", ["ctc", "rnnt"])
def test_evaluate_reads_the_mean_of_the_best_checkpoints(
    kind: str, runs: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    average.main([str(runs[kind]), "--best", "2", f"--out={tmp_path / 'mean'}"])
    load_recogniser(read_export(tmp_path / "mean"))
    data = [f"--data.dataset={dataset}", "--data.split=test", f"--out={tmp_path / 'results'}", "--device=cpu"]
    evaluate.evaluate(evaluate.parse_command([f"--export={tmp_path / 'mean'}", *data]), World())
    assert json.loads((tmp_path / "results/results.json").read_text())["scores"]["all"]["num_recordings"] == 3


@pytest.mark.parametrize("start", ["mean", "checkpoint"])
def test_fine_tuning_starts_from_a_mean_and_from_a_checkpoint_and_prints_what_was_used(
    start: str, runs: dict[str, Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = tmp_path / "mean" if start == "mean" else runs["pretrain"] / "checkpoints/step-00000004"
    if start == "mean":
        average.main([str(runs["pretrain"]), "--last", "2", f"--out={init}"])
        tensors = read_export(init).tensors
    else:
        tensors = weights(runs["pretrain"], 4)
    capsys.readouterr()
    options = [f"--finetune.init={init}", "--finetune.drop_top_blocks=1", "--finetune.reinitialise_top_blocks=1"]
    plain = ["--data.normalisation=recording", "--encoder.convolution_norm=layer_norm", "--encoder.num_layers=2"]
    rate = ["--optimizer.learning_rate=1e-12", "--run.steps=1", "--encoder.output=weighted_sum"]
    train("ctc", dataset, tmp_path / "run", *plain, *options, *rate)
    after = weights(tmp_path / "run", 1)
    for name, tensor in after.items():
        kept = name.startswith("encoder.") and not name.startswith(("encoder.blocks.1.", "encoder.layer_sum"))
        assert kept == (name in tensors and torch.allclose(tensor, tensors[name], atol=1e-6)), name
    printed = capsys.readouterr().out
    block = sum(name.startswith("encoder.blocks.1.") for name in after)
    kept = sum(name.startswith(("encoder.subsampling.", "encoder.blocks.0.")) for name in after)
    assert f"finetune.init {init}, a pretrained model: matched {kept} of the {len(after)} tensors" in printed
    lines = [line for line in printed.splitlines() if line.startswith("    ")]
    assert f"    fresh: encoder.blocks.1 ({block}): finetune.reinitialise_top_blocks is 1" in lines
    assert "    fresh: head (2): not in finetune.init" in lines
    assert "    fresh: encoder.layer_sum.weight (1): not in finetune.init" in lines
    assert f"    left out: encoder.blocks.2 ({block}): finetune.drop_top_blocks is 1" in lines
    assert any("only the encoder is used" in line for line in lines) == (start == "checkpoint")


def test_fine_tuning_from_a_recogniser_leaves_out_its_head_and_from_scratch_prints_nothing(
    runs: dict[str, Path], dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = runs["rnnt"] / "checkpoints/step-00000004"
    plain = ["--data.normalisation=recording", "--encoder.convolution_norm=layer_norm", "--run.steps=1"]
    train("ctc", dataset, tmp_path / "run", *plain, f"--finetune.init={checkpoint}", "--optimizer.learning_rate=1e-12")
    printed = capsys.readouterr().out
    assert "a rnnt model: matched" in printed and "left out: joint (" in printed
    moving = {
        name.removeprefix("average/"): tensor
        for name, tensor in weights(runs["rnnt"], 4, "extra").items()
        if name.startswith("average/encoder.")
    }
    after = weights(tmp_path / "run", 1)
    assert all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in moving.items())
    train("ctc", dataset, tmp_path / "scratch", *plain)
    assert "matched" not in capsys.readouterr().out
