"""Objectives other than the default in the real script: resumption, spread over processes, refusals."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune_ctc
import pretrain
from bestrq.training.stop import StopRequest
from common.config import parse
from common.errors import UserError
from tests.gloo import run_distributed
from tests.tiny import DATA, ENCODER, RUN, make_dataset

STEPS = 6
COMMON = [*ENCODER, *DATA, *RUN, "--encoder.num_layers=3", "--data.num_workers=0", "--optimizer.learning_rate=1e-2",
          "--optimizer.warmup_steps=2", "--quantizer.codebook_size=32", "--quantizer.num_codebooks=2",
          "--masking.span_ms=120", "--masking.start_probability=0.05", "--checkpoint.keep_last=9",
          "--validation.every_steps=3", "--masking.noise_std=0.2"]  # fmt: skip
ADAPT = [
    *("--quantizer.codebook_dim=8", "--quantizer.pca_steps=2", "--quantizer.whitening=0.5"),
    *("--quantizer.refine_steps=[5]", "--quantizer.refine_window=3"),
]
CLUSTERS = ["--targets.kind=clusters", "--targets.clusters=12", "--targets.layer=1", "--targets.cluster_seconds=20"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny", recordings=30)


@pytest.fixture(scope="module")
def exports(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pretrained and a CTC model of the same encoder."""
    folder = tmp_path_factory.mktemp("exports")
    run(dataset, folder / "pretrained", "--run.steps=2")
    options = [*ENCODER, *DATA, *RUN, "--data.num_workers=0", "--run.steps=30", "--optimizer.learning_rate=2e-2"]
    places = [f"--data.dataset={dataset}", f"--run.folder={folder / 'ctc'}"]
    finetune_ctc.train(parse(finetune_ctc.Config, [*options, *places]))
    return {name: folder / name / "export" for name in ("pretrained", "ctc")}


def arguments(dataset: Path, folder: Path, *more: str) -> list[str]:
    return [*COMMON, f"--data.dataset={dataset}", f"--run.folder={folder}", f"--run.steps={STEPS}", *more]


def run(dataset: Path, folder: Path, *more: str) -> None:
    pretrain.train(parse(pretrain.Config, arguments(dataset, folder, *more)))


def options_of(case: str, exports: dict[str, Path]) -> list[str]:
    teacher, ctc = (f"--targets.export={exports[name]}" for name in ("pretrained", "ctc"))
    return {
        "pca and refinement": ADAPT,
        "clusters": [teacher, "--targets.source=teacher", *CLUSTERS],
        "labels and codes": [ctc, "--targets.source=both", "--targets.kind=ctc_labels", "--targets.teacher_weight=0.5"],
        "posteriors": [ctc, "--targets.source=teacher", "--targets.kind=ctc_posteriors", "--targets.blank=keep"],
        "inner layers": ["--targets.inner_layers=[1,2]", "--targets.unmasked_weight=0.1"],
        "distilled": ["--targets.distill_layers=[1,2]", "--targets.distill_steps=[3,5]", *ADAPT],
        "corruption": ["--masking.bands=2", "--masking.band_mels=20", "--masking.mix_probability=0.7"],
        "dynamic chunks": ["--encoder.mask=chunk", "--encoder.chunk_size=4", "--encoder.dynamic_chunks=true"],
        "everything": [ctc, *ADAPT, "--targets.source=both", *CLUSTERS, "--targets.inner_layers=[2]",
                       "--masking.bands=1", "--masking.mix_probability=0.5", "--targets.unmasked_weight=0.2"],
    }[case]  # fmt: skip


CASES = ["pca and refinement", "clusters", "labels and codes", "posteriors", "inner layers", "distilled", "corruption",
         "dynamic chunks", "everything"]  # fmt: skip


def tensors(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    checkpoint = folder / f"checkpoints/step-{step:08d}"
    return {f"{file} {name}": tensor for file in ("model", "optimizer", "extra")
            for name, tensor in load_file(checkpoint / f"{file}.safetensors").items()}  # fmt: skip


def lines(folder: Path, kind: str = "train") -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def losses(folder: Path) -> list[float]:
    names = sorted(name for name in lines(folder)[0] if name.startswith("loss"))
    return [row[name] for row in lines(folder) for name in names]


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_continued_is_the_same_bit_for_bit(
    case: str, dataset: Path, exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after 1, 3 and 4 steps: before and after the components, and within the window of the refinement."""
    more = options_of(case, exports)
    run(dataset, tmp_path / "through", *more)
    for steps in (1, 2, 1):
        with monkeypatch.context() as patch:
            answers = iter([False] * steps)
            patch.setattr(StopRequest, "noticed", lambda self, answers=answers: next(answers, True))
            run(dataset, tmp_path / "stopped", *more)
    run(dataset, tmp_path / "stopped", *more)
    assert_identical(tensors(tmp_path / "through"), tensors(tmp_path / "stopped"))
    assert losses(tmp_path / "through") == losses(tmp_path / "stopped")
    assert lines(tmp_path / "through", "dev") == lines(tmp_path / "stopped", "dev")
    plain = load_file(tmp_path / "through/export/targets.safetensors")
    assert_identical(plain, load_file(tmp_path / "stopped/export/targets.safetensors"))
    assert "quantizer.codebook" in plain and ("teacher.centroids" in plain) == (case in ("clusters", "everything"))


def run_in_world(world, options: list[str]) -> None:
    pretrain.start_world = lambda settings: world  # type: ignore[attr-defined] # this process has joined one already
    pretrain.train(parse(pretrain.Config, options))


NO_DROPOUT = ["--encoder.dropout=0", "--encoder.attention_dropout=0"]


@pytest.mark.parametrize("case", ["labels and codes", "distilled", "everything"])
@pytest.mark.parametrize("spread", ["accumulation", "ddp", "fsdp"])
def test_the_same_global_batch_gives_the_same_losses_however_it_is_spread(
    case: str, spread: str, dataset: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    more = [*options_of(case, exports), *NO_DROPOUT]
    run(dataset, tmp_path / "one", *more)
    if spread == "accumulation":
        run(dataset, tmp_path / "spread", *more, "--accumulation=4")
    else:
        strategy = f"--distributed.strategy={spread}"
        run_distributed(run_in_world, 2, arguments(dataset, tmp_path / "spread", *more, strategy))
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "one"), rel=5e-4)
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "spread")
    for name in (name for name in one if name.startswith("extra ") and "origin" not in name):
        torch.testing.assert_close(other[name].double(), one[name].double(), rtol=1e-4, atol=1e-4)
    (one_dev, *_), (spread_dev, *_) = lines(tmp_path / "one", "dev"), lines(tmp_path / "spread", "dev")
    assert spread_dev["dev_loss"] == pytest.approx(one_dev["dev_loss"], rel=1e-3)


def test_counts_and_alarms_restart_when_the_targets_change(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(dataset, tmp_path / "run", *ADAPT)
    seen = [row["targets_seen"] for row in lines(tmp_path / "run")]
    assert seen[1] > seen[0] and seen[2] < seen[1], "restart after step 2"
    assert seen[4] > seen[3] > seen[2] and seen[5] < seen[4], "restart after step 5"
    out = capfd.readouterr().out
    assert "step 2: projection replaced by principal components with" in out
    assert "step 5: codes refined:" in out and "of 64 moved" in out
    assert lines(tmp_path / "run")[-1]["perplexity"] > 3


def test_the_last_codebook_becomes_the_distilled_one_and_the_others_are_refined(
    dataset: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    distill = ["--targets.distill_layers=[1,2]", "--targets.distill_steps=[4]", "--checkpoint.every_steps=1"]
    refine = ["--quantizer.refine_steps=[2]", "--quantizer.refine_window=2"]
    run(dataset, tmp_path / "run", *distill, *refine)
    codes = [tensors(tmp_path / "run", step)["extra quantizer.codebook"] for step in range(1, STEPS + 1)]
    changed = [[not torch.equal(a[book], b[book]) for book in (0, 1)] for a, b in pairwise(codes)]
    assert changed == [[True, False], [False, False], [False, True], [False, False], [False, False]]
    trained = tensors(tmp_path / "run", 4)["model distilled.codes"]
    trained = trained / trained.norm(dim=-1, keepdim=True)
    distances = torch.cdist(codes[3][1].double(), trained.double()).min(dim=1)
    assert distances.values.max() < 1e-6 and distances.indices.unique().numel() == 32


def test_losses_of_single_heads_are_reported_and_sum_up(
    dataset: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    run(dataset, tmp_path / "run", *options_of("labels and codes", exports), "--targets.inner_layers=[1]")
    for kind, prefix in (("train", ""), ("dev", "dev_")):
        for row in lines(tmp_path / "run", kind):
            parts = [row[f"{prefix}loss_{name}"] for name in ("quantizer", "teacher", "quantizer_block_1",
                                                              "teacher_block_1")]  # fmt: skip
            total = parts[0] + 0.5 * parts[1] + parts[2] + 0.5 * parts[3]
            assert row[f"{prefix}loss"] == pytest.approx(total, rel=1e-5)


def test_validation_uses_clean_input_and_the_default_objective_has_no_further_losses(
    dataset: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    still = ["--optimizer.learning_rate=1e-12", "--run.steps=1", "--validation.every_steps=1"]
    run(dataset, tmp_path / "plain", *still)
    run(dataset, tmp_path / "mixed", *still, *options_of("corruption", exports))
    (plain,), (mixed,) = (lines(tmp_path / name, "dev") for name in ("plain", "mixed"))
    assert plain["dev_loss"] == pytest.approx(mixed["dev_loss"], rel=1e-6)
    (plain,), (mixed,) = (lines(tmp_path / name) for name in ("plain", "mixed"))
    assert plain["loss"] != mixed["loss"] and plain["unigram_entropy"] == mixed["unigram_entropy"]
    assert not [name for name in plain if name.startswith("loss_")]


def test_validation_is_on_masked_frames_only(dataset: Path, tmp_path: Path) -> None:
    """Rows that pad the last batch have no mask, and would otherwise count as unmasked."""
    still = ["--optimizer.learning_rate=1e-12", "--run.steps=1", "--validation.every_steps=1"]
    run(dataset, tmp_path / "masked", *still, "--targets.inner_layers=[1]")
    run(dataset, tmp_path / "both", *still, "--targets.inner_layers=[1]", "--targets.unmasked_weight=0.5")
    (masked,), (both,) = (lines(tmp_path / name, "dev") for name in ("masked", "both"))
    assert masked["dev_loss"] == pytest.approx(both["dev_loss"], rel=1e-6)
    (masked,), (both,) = (lines(tmp_path / name) for name in ("masked", "both"))
    assert masked["loss"] != both["loss"]


def test_checkpoints_of_another_quantizer_are_refused(dataset: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path / "run", *ADAPT, "--run.steps=3")
    with pytest.raises(UserError, match=r"quantizer.seed was 142, is 5"):
        run(dataset, tmp_path / "run", *ADAPT, "--run.steps=3", "--quantizer.seed=5")
    config = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(config.replace("seed: 142", "seed: 5"))
    with pytest.raises(UserError, match=r"step-00000003 has another quantizer"):
        run(dataset, tmp_path / "run", *ADAPT, "--run.steps=3", "--quantizer.seed=5")


def test_a_teacher_that_does_not_fit_is_refused_before_the_run_folder_exists(
    dataset: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    pretrained, ctc = (f"--targets.export={exports[name]}" for name in ("pretrained", "ctc"))
    teacher = "--targets.source=teacher"
    for options, message in (
        ([ctc, teacher, "--encoder.subsampling=striding", "--encoder.subsampling_factor=8"],
         r"has a stride of 4 mel frames, the encoder of this run 8: .* same stride"),
        ([pretrained, teacher, "--targets.kind=ctc_labels"], r"has no CTC head: give an export of finetune_ctc.py"),
        ([pretrained, teacher, "--targets.layer=4"], r"targets.layer is 4: the blocks .* are 1 to 3"),
        ([ctc, teacher, "--data.normalisation=dataset"], r"data.normalisation: 'dataset' != 'recording'"),
        (["--targets.export=nowhere", teacher], r"there is no export at nowhere"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            run(dataset, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_teacher_may_move_but_not_change(dataset: Path, exports: dict[str, Path], tmp_path: Path) -> None:
    options = ["--targets.source=teacher", *CLUSTERS, "--run.steps=2"]
    run(dataset, tmp_path / "run", f"--targets.export={exports['pretrained']}", *options)
    moved = shutil.copytree(exports["pretrained"], tmp_path / "moved")
    run(dataset, tmp_path / "run", f"--targets.export={moved}", *options)
    with pytest.raises(UserError, match=r"started with targets.export [0-9a-f]{64}, and now it is"):
        run(dataset, tmp_path / "run", f"--targets.export={exports['ctc']}", *options)


def test_dynamic_chunks_draw_other_chunks_every_step_and_validate_with_the_largest(
    dataset: Path, tmp_path: Path
) -> None:
    still = ["--encoder.dropout=0", "--encoder.attention_dropout=0", "--optimizer.learning_rate=1e-12",
             "--validation.every_steps=1", "--encoder.mask=chunk", "--encoder.chunk_size=4"]  # fmt: skip
    run(dataset, tmp_path / "fixed", *still)
    run(dataset, tmp_path / "dynamic", *still, "--encoder.dynamic_chunks=true")
    fixed, dynamic = ([row["loss"] for row in lines(tmp_path / name)] for name in ("fixed", "dynamic"))
    assert sum(a != b for a, b in zip(fixed, dynamic, strict=True)) >= 3, "most steps have another chunk size"
    fixed, dynamic = ([row["dev_loss"] for row in lines(tmp_path / name, "dev")] for name in ("fixed", "dynamic"))
    assert fixed == pytest.approx(dynamic, rel=1e-6)
