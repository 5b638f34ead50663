"""Combinations of settings that run on the CPU and on the simulated GPU, and have to agree."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.transducer import TransducerModel, TransducerSettings
from bestrq.training.stop import StopRequest
from common.segments import Segments
from tests.gpu.simulated_cuda import simulated_cuda
from tests.gpu.simulated_runs import Run, differences, evaluate_export, train_on_cpu, train_on_simulated_cuda

PRETRAINED = "PRETRAINED"
"""in an option: the export of a pretraining run"""
STRIDING = ["--encoder.subsampling=striding", "--encoder.subsampling_factor=8"]
STAGES = '--encoder.earlier_stages=[{"num_layers":1,"dim":8,"num_heads":2,"feedforward_dim":12,"group_size":3}]'

COMBINATIONS: dict[str, tuple[str, ...]] = {
    "pretrain": ("pretrain",),
    "four codebooks": ("pretrain", "--quantizer.num_codebooks=4"),
    "ctc": ("finetune_ctc",),
    "rnnt": ("finetune_rnnt",),
    "pruned rnnt and ctc": ("finetune_rnnt", "--transducer.prune_range=6", "--transducer.ctc_weight=0.3"),
    "tdt": ("finetune_rnnt", "--transducer.durations=[0,1,2]"),
    "lstm prediction": ("finetune_rnnt", "--transducer.prediction=lstm", "--transducer.prediction_layers=2"),
    "fast emit": ("finetune_rnnt", "--transducer.fast_emit=0.01"),
    "pruned tdt": ("finetune_rnnt", "--transducer.durations=[0,1,2]", "--transducer.prune_range=4"),
    "batch norm": ("pretrain", "--encoder.convolution_norm=batch_norm"),
    "relative positions": ("pretrain", "--encoder.position=relative"),
    "fourier positions": ("pretrain", "--encoder.position=fourier"),
    "no positions": ("pretrain", "--encoder.position=none"),
    "shared key heads": ("pretrain", "--encoder.num_kv_heads=1"),
    "swiglu, rms norm": ("pretrain", "--encoder.feedforward=swiglu", "--encoder.norm=rms_norm",
                         "--encoder.convolution_norm=rms_norm"),
    "striding": ("pretrain", *STRIDING),
    "stacking": ("pretrain", "--encoder.subsampling=stacking"),
    "window": ("pretrain", "--encoder.mask=window", "--encoder.window=8"),
    "window, relative": ("pretrain", "--encoder.mask=window", "--encoder.window=8", "--encoder.position=relative"),
    "causal": ("pretrain", "--encoder.mask=causal", "--encoder.causal_convolution=true"),
    "chunk masks, accumulation": ("pretrain", "--encoder.mask=chunk", "--encoder.chunk_size=6",
                                  "--encoder.dynamic_chunks=true", "--accumulation=2"),
    "chunk masks of two chunks": ("pretrain", "--encoder.mask=chunk", "--encoder.chunk_size=6",
                                  "--encoder.left_chunks=2"),
    "stages, grouped attention": ("pretrain", STAGES, "--data.row_frames=384"),
    "selective checkpointing": ("pretrain", "--encoder.activation_checkpointing=selective"),
    "full checkpointing": ("pretrain", "--encoder.activation_checkpointing=full", "--encoder.position=relative"),
    "layer drop, weighted sum": ("pretrain", "--encoder.layer_drop=0.5", "--encoder.output=weighted_sum"),
    "objectives": ("pretrain", f"--targets.export={PRETRAINED}", "--targets.source=both", "--targets.clusters=8",
                   "--targets.cluster_seconds=10", "--targets.inner_layers=[1]", "--targets.unmasked_weight=0.1",
                   "--targets.distill_layers=[1]", "--targets.distill_steps=[2]", "--quantizer.num_codebooks=2",
                   "--quantizer.pca_steps=1", "--quantizer.refine_steps=[2]", "--quantizer.refine_window=1",
                   "--masking.bands=1", "--masking.mix_probability=0.5"),
    "probe": ("pretrain", "--probe.every_steps=3", "--probe.minutes=0.2", "--probe.evaluation_minutes=0.1",
              "--probe.steps=2"),
    "madgrad": ("pretrain", "--optimizer.name=madgrad"),
    "frozen ctc": ("finetune_ctc", f"--finetune.init={PRETRAINED}", "--finetune.freeze_encoder_steps=2",
                   "--finetune.layer_decay=0.7"),
    "ctc, masks, averages, accumulation": (
        "finetune_ctc", "--accumulation=2", "--hidden_masks.time_prob=0.3", "--hidden_masks.channel_prob=0.3",
        "--hidden_masks.channel_length=4", "--spec_augment.time_masks_per_frame=0.02", "--averaging.ema_decay=0.9",
        "--averaging.last=2", "--validation.every_steps=2"),
    "rnnt, accumulation, full checkpointing": (
        "finetune_rnnt", "--accumulation=2", "--encoder.activation_checkpointing=full"),
}  # fmt: skip
"""name -> script and settings of a run in float32, without dropout"""

REDUCED = {
    "pretrain in bfloat16": ("pretrain",),
    "muon in bfloat16": ("pretrain", "--optimizer.name=muon"),
    "ctc in bfloat16": ("finetune_ctc",),
    "rnnt in bfloat16": ("finetune_rnnt", "--transducer.ctc_weight=0.3", "--transducer.prune_range=6"),
    "tdt in bfloat16": ("finetune_rnnt", "--transducer.durations=[0,1,2]"),
    "lstm prediction in bfloat16": ("finetune_rnnt", "--transducer.prediction=lstm"),
    "selective checkpointing in bfloat16": ("pretrain", "--encoder.activation_checkpointing=selective"),
}
"""the same in bfloat16 on the device, whose losses are within 3 % of float32 on the CPU"""

EVALUATIONS = {
    "evaluate ctc": ("finetune_ctc",),
    "evaluate ctc by beam search": ("finetune_ctc", "--decoder.beam=4"),
    "evaluate ctc in one pass": ("finetune_ctc", "--inference.mode=whole"),
    "evaluate ctc in windows": ("finetune_ctc", "--inference.context_seconds=1"),
    "evaluate rnnt": ("finetune_rnnt",),
    "evaluate rnnt by beam search": ("finetune_rnnt", "--decoder.beam=2"),
}
"""script whose export is evaluated, and settings of evaluate.py"""


def compare_training(dataset: Path, folder: Path, script: str, *options: str) -> list[str]:
    """Differences between the runs on both devices."""
    if any(PRETRAINED in option for option in options):
        train_on_cpu("pretrain", dataset, folder / "pretrained", "--run.steps=1")
    options = tuple(option.replace(PRETRAINED, str(folder / "pretrained" / "export")) for option in options)
    cpu = train_on_cpu(script, dataset, folder / "cpu", *options)
    return differences(cpu, train_on_simulated_cuda(script, dataset, folder / "cuda", *options))


def compare_bfloat16(dataset: Path, folder: Path, script: str, *options: str) -> list[str]:
    """Losses of the first two steps in bfloat16 on the device that differ by more than 3 %."""
    cpu = train_on_cpu(script, dataset, folder / "cpu", *options)
    low = "--distributed.precision=bfloat16"
    cuda = train_on_simulated_cuda(script, dataset, folder / "cuda", *options, low)
    return differences(_first_losses(cpu), _first_losses(cuda), tolerance=0.03)


def _first_losses(run: Run) -> Run:
    """The run with the losses of its first two steps only: later ones depend on AdamW's amplified rounding."""
    train = [line for line in run.metrics if line["kind"] == "train"][:2]
    return Run([{name: line[name] for name in ("kind", "step", "loss")} for line in train])


def compare_evaluation(dataset: Path, folder: Path, script: str, *options: str) -> list[str]:
    """Recordings with other results on the device."""
    train_on_cpu(script, dataset, folder / "run", "--run.steps=2")
    export = folder / "run" / "export"
    cpu = evaluate_export(export, dataset, folder / "cpu", "cpu", *options)
    with simulated_cuda() as gpu:
        cuda = evaluate_export(export, dataset, folder / "cuda", "auto", *options)
    if not gpu.kernels:
        return ["the evaluation did not run on the device"]
    pairs = zip(cpu["recordings"], cuda["recordings"], strict=True)
    return [f"{ours} on the device, {expected} on the CPU" for expected, ours in pairs if ours != expected]


def compare_resumed_run(dataset: Path, folder: Path, script: str) -> list[str]:
    """Differences between an uninterrupted run on the CPU and one on the device that stops and resumes."""
    cpu = train_on_cpu(script, dataset, folder / "cpu")
    answers = iter([False, False])
    with mock.patch.object(StopRequest, "noticed", lambda self: next(answers, True)):
        train_on_simulated_cuda(script, dataset, folder / "cuda")
    cuda = train_on_simulated_cuda(script, dataset, folder / "cuda")
    return differences(cpu, cuda)


def compare_short_segments(durations: tuple[int, ...] = (), prune_range: int = 0) -> list[str]:
    """Differences of the transducer's loss for segments without labels and of one frame (4 mel frames)."""
    encoder = EncoderSettings(
        num_mels=8, dim=8, num_layers=1, num_heads=2, feedforward_dim=8, kernel_size=3, subsampling_channels=2,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    settings = TransducerSettings(
        prediction_dim=6, joint_dim=6, dropout=0.0, durations=list(durations), prune_range=prune_range
    )
    start, length = torch.tensor([[0, 48, 60, 72]]), torch.tensor([[40, 4, 8, 20]])
    labels, sizes = torch.randint(1, 5, (4, 3), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1, 1, 0])

    def sums(device: str) -> list[float]:
        torch.manual_seed(0)
        model = TransducerModel(encoder, settings, 5).to(device)
        log_mel = torch.randn(1, 96, 8, generator=torch.Generator().manual_seed(1)).to(device)
        loss = model(log_mel, Segments(start, length, 96), labels, sizes).loss_sum
        loss.backward()
        norms = [float(parameter.grad.norm()) for parameter in model.parameters() if parameter.grad is not None]
        return [float(loss), *norms]

    cpu = sums("cpu")
    with simulated_cuda():
        cuda = sums("cuda")
    pairs = zip(cpu, cuda, strict=True)
    wrong = [f"{b} on the device, {a} on the CPU" for a, b in pairs if not abs(a - b) <= 1e-4 * max(1, abs(a))]
    return [f"{len(wrong)} of {len(cpu)} sums differ, first {wrong[0]}"] if wrong else []


def all_checks(dataset: Path, folder: Path) -> dict[str, Callable[[], list[str]]]:
    """Check of every combination by name; a check returns its differences."""
    checks: dict[str, Callable[[], list[str]]] = {}
    for compare, table in (
        (compare_training, COMBINATIONS), (compare_bfloat16, REDUCED), (compare_evaluation, EVALUATIONS)
    ):  # fmt: skip
        checks |= {name: partial(compare, dataset, folder / name, *options) for name, options in table.items()}
    for script in ("pretrain", "finetune_ctc", "finetune_rnnt"):
        checks[f"resumed {script}"] = partial(compare_resumed_run, dataset, folder / f"resumed {script}", script)
    checks["rnnt, short segments"] = compare_short_segments
    checks["tdt, short segments"] = partial(compare_short_segments, (0, 1, 2))
    checks["pruned rnnt, short segments"] = partial(compare_short_segments, (), 2)
    return checks


def problems(check: Callable[[], list[str]]) -> list[str]:
    """Differences that a check returns, or the error that it raises with the line of its origin."""
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a failure of any kind is a result
        last = traceback.extract_tb(error.__traceback__)[-1]
        return [f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"]
