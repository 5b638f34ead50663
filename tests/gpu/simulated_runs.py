"""Runs of the training and evaluation scripts on the CPU and on the simulated GPU, with the waits of every step."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import evaluate
import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.pretraining import objective
from bestrq.pretraining.hashed_noise import hashed_noise
from bestrq.training.meters import Throughput
from bestrq.training.process import World
from common.config import parse
from common.segments import Segments
from pipelines.recogniser import start_inference
from tests.gpu.host_clock import HostClock, measure_overheads
from tests.gpu.simulated_cuda import SimulatedCuda, simulated_cuda
from tests.tiny import DATA, ENCODER

SCRIPTS: dict[str, Any] = {"pretrain": pretrain, "finetune_ctc": finetune_ctc, "finetune_rnnt": finetune_rnnt}
SMALL = {
    "pretrain": ["--quantizer.codebook_size=64"],
    "finetune_ctc": [],
    "finetune_rnnt": ["--transducer.prediction_dim=12", "--transducer.joint_dim=10", "--transducer.dropout=0"],
}
NO_DROPOUT = ["--encoder.dropout=0", "--encoder.attention_dropout=0"]
COMPARED = ("loss", "grad_norm", "accuracy", "transducer_loss", "ctc_loss", "dev_loss", "dev_accuracy", "dev_cer")
"""metrics that are the same on both devices"""


@dataclass
class Run:
    """Metrics of a run, and the waits of the simulated GPU."""

    metrics: list[dict[str, Any]]
    """lines of metrics.jsonl"""
    step_waits: list[Counter[tuple[str, str]]] = field(default_factory=list)
    """waits from the start of every step but the last to that of the next one, by (reason, place)"""
    clocks: list[HostClock] = field(default_factory=list)
    """host's time in the same steps, if measured"""
    gpu: SimulatedCuda | None = None
    """None on the CPU"""

    def compared(self) -> list[tuple[str, int, str, float]]:
        """Numbers that both devices must agree on: (kind, step, name, value).

        On a device, the gradient norm in a line is that of the step before (see `StepGuard.apply`), and missing in the
        first line of a process.
        """
        late = 0 if self.gpu is None else 1
        return [
            (line["kind"], line["step"] - late * (name == "grad_norm"), name, line[name])
            for line in self.metrics
            for name in COMPARED
            if name in line and not (late and name == "grad_norm" and line[name] is None)
        ]


def arguments(script: str, dataset: Path, folder: Path, device: str, *more: str) -> list[str]:
    """Command line of a tiny run of 3 steps in float32 without dropout and loader processes, logged at every step."""
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", f"--distributed.device={device}"]
    run = ["--run.steps=3", "--run.log_every=1", "--distributed.precision=float32", "--data.num_workers=0"]
    if script != "pretrain":
        run.append("--validation.max_recordings=1")  # an untrained transducer emits many labels per frame
    return [*ENCODER, *DATA, *SMALL[script], *NO_DROPOUT, *run, *places, *more]


def _fill_as_on_a_device(log_mel: Tensor, mask: Tensor, segments: Segments, noise_std: float) -> Tensor:
    """`masking.fill_with_noise` on a device, whose noise differs from that of a CPU."""
    return torch.where(mask.unsqueeze(-1), noise_std * hashed_noise(segments, log_mel), log_mel)


def train_on_cpu(script: str, dataset: Path, folder: Path, *more: str) -> Run:
    """Run a training script on the CPU, with the noise of masked frames of a device."""
    module = SCRIPTS[script]
    with mock.patch.object(objective, "fill_with_noise", _fill_as_on_a_device):
        module.train(parse(module.Config, arguments(script, dataset, folder, "cpu", *more)))
    return Run(read_metrics(folder))


def train_on_simulated_cuda(script: str, dataset: Path, folder: Path, *more: str, measure_host: bool = False) -> Run:
    """Run a training script on the simulated GPU, which `distributed.device=auto` selects.

    With `measure_host`, the host's time is measured from the start of every step to the end of its bookkeeping.
    """
    module = SCRIPTS[script]
    with simulated_cuda() as gpu:
        config = parse(module.Config, arguments(script, dataset, folder, "auto", *more))
        overheads = measure_overheads(lambda clock: setattr(gpu, "clock", clock)) if measure_host else (0.0, 0.0)
        seed_step, waiting = module.seed_step, module.Throughput.waiting
        totals: list[Counter[tuple[str, str]]] = []
        clocks: list[HostClock] = []

        def start_step(*args: Any) -> None:
            totals.append(Counter(gpu.waits))
            if measure_host:
                clocks.append(HostClock(*overheads))
                gpu.clock = clocks[-1]
            seed_step(*args)

        def end_step(*args: Any) -> AbstractContextManager[None]:
            if gpu.clock is not None:  # the loader's time is not the step's
                gpu.clock.stop()
                gpu.clock = None
            return waiting(*args)

        with mock.patch.multiple(module, seed_step=start_step), mock.patch.object(Throughput, "waiting", end_step):
            module.train(config)
    steps = [after - before for before, after in zip(totals, totals[1:], strict=False)]
    return Run(read_metrics(folder), steps, clocks[:-1], gpu)


def evaluate_export(export: Path, dataset: Path, folder: Path, device: str, *more: str) -> dict[str, Any]:
    """Results of evaluate.py in float32 for an export; device 'auto' in `simulated_cuda()` is the simulated GPU."""
    places = [f"--export={export}", f"--data.dataset={dataset}", f"--out={folder}", f"--device={device}"]
    places.append("--inference.precision=float32")
    config = parse(evaluate.Config, [*places, "--resamples=100", "--data.split=dev", *more])
    world: World = start_inference(config.device, config.threads, config.inference)
    evaluate.evaluate(config, world)
    return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of the metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def differences(cpu: Run, cuda: Run, tolerance: float = 1e-5) -> list[str]:
    """Metrics that differ by more than the relative tolerance, or are missing on one side, except gradient norms that
    the device has not logged."""
    mine, other = sorted(cuda.compared()), sorted(cpu.compared())
    logged = {row[:3] for row in mine}
    other = [row for row in other if row[:3] in logged or row[2] != "grad_norm"]
    if [row[:3] for row in mine] != [row[:3] for row in other]:
        return [f"the runs have other metrics: {len(mine)} and {len(other)} numbers"]
    return [
        f"{kind} step {step} {name}: {value!r} on the device, {expected!r} on the CPU"
        for (kind, step, name, value), (*_, expected) in zip(mine, other, strict=True)
        if abs(value - expected) > tolerance * max(abs(expected), 1e-3)
    ]


def waits_of_a_step(run: Run) -> Counter[tuple[str, str]]:
    """Waits of the step with the most of them, except the first step, which saves pictures."""
    return max(run.step_waits[1:], key=lambda step: sum(step.values()))
