"""Runs of the training and evaluation scripts on the CPU and on the simulated GPU, with the waits of every step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import evaluate
import finetune_ctc
import finetune_rnnt
import pretrain
from bestrq.training.process import World
from common.config import parse
from pipelines.recogniser import start_inference
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
    gpu: SimulatedCuda | None = None
    """None on the CPU"""

    def compared(self) -> list[tuple[str, int, str, float]]:
        """Numbers that both devices must agree on: (kind, step, name, value)."""
        return [
            (line["kind"], line["step"], name, line[name]) for line in self.metrics for name in COMPARED if name in line
        ]


def arguments(script: str, dataset: Path, folder: Path, device: str, *more: str) -> list[str]:
    """Command line of a tiny run of 3 steps in float32 without dropout and loader processes, logged at every step."""
    places = [f"--data.dataset={dataset}", f"--run.folder={folder}", f"--distributed.device={device}"]
    run = ["--run.steps=3", "--run.log_every=1", "--distributed.precision=float32", "--data.num_workers=0"]
    if script != "pretrain":
        run.append("--validation.max_recordings=1")  # an untrained transducer emits many labels per frame
    return [*ENCODER, *DATA, *SMALL[script], *NO_DROPOUT, *run, *places, *more]


def train_on_cpu(script: str, dataset: Path, folder: Path, *more: str) -> Run:
    """Run a training script on the CPU."""
    module = SCRIPTS[script]
    module.train(parse(module.Config, arguments(script, dataset, folder, "cpu", *more)))
    return Run(read_metrics(folder))


def train_on_simulated_cuda(script: str, dataset: Path, folder: Path, *more: str, measure_host: bool = False) -> Run:
    """Run a training script on the simulated GPU, which `distributed.device=auto` selects.

    With `measure_host`, `gpu.host_seconds` holds the processor time between operators, from the third step on.
    """
    module = SCRIPTS[script]
    with simulated_cuda() as gpu:
        config = parse(module.Config, arguments(script, dataset, folder, "auto", *more))
        seed_step, totals = module.seed_step, []

        def start_step(*args: Any) -> None:
            totals.append(Counter(gpu.waits))
            if measure_host and len(totals) == 3:
                gpu.host_seconds = Counter()
            seed_step(*args)

        with mock.patch.object(module, "seed_step", start_step):
            module.train(config)
    steps = [after - before for before, after in zip(totals, totals[1:], strict=False)]
    return Run(read_metrics(folder), steps, gpu)


def evaluate_export(export: Path, dataset: Path, folder: Path, device: str, *more: str) -> dict[str, Any]:
    """Results of evaluate.py for an export; device 'auto' in `simulated_cuda()` is the simulated GPU."""
    places = [f"--export={export}", f"--data.dataset={dataset}", f"--out={folder}", f"--device={device}"]
    config = parse(evaluate.Config, [*places, "--resamples=100", "--data.split=dev", *more])
    world: World = start_inference(config.device, config.threads, config.inference)
    evaluate.evaluate(config, world)
    return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of the metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def differences(cpu: Run, cuda: Run, tolerance: float = 1e-5) -> list[str]:
    """Metrics that differ by more than the relative tolerance, or are missing on one side."""
    mine, other = cuda.compared(), cpu.compared()
    if [row[:3] for row in mine] != [row[:3] for row in other]:
        return [f"the runs have other metrics: {len(mine)} and {len(other)} numbers"]
    return [
        f"{kind} step {step} {name}: {value!r} on the device, {expected!r} on the CPU"
        for (kind, step, name, value), (*_, expected) in zip(mine, other, strict=True)
        if abs(value - expected) > tolerance * max(abs(expected), 1e-3)
    ]


def waits_of_a_step(runs: Sequence[Run] | Run) -> Counter[tuple[str, str]]:
    """Waits of the step with the most of them, except the first step, which saves pictures."""
    runs = [runs] if isinstance(runs, Run) else runs
    steps = [step for run in runs for step in run.step_waits[1:]]
    return max(steps, key=lambda step: sum(step.values()))


COMBINATIONS: dict[str, tuple[str, ...]] = {
    "pretrain": ("pretrain",),
    "four codebooks": ("pretrain", "--quantizer.num_codebooks=4"),
    "ctc": ("finetune_ctc",),
    "rnnt": ("finetune_rnnt",),
    "pruned rnnt and ctc": ("finetune_rnnt", "--transducer.prune_range=6", "--transducer.ctc_weight=0.3"),
    "tdt": ("finetune_rnnt", "--transducer.durations=[0,1,2]"),
    "lstm prediction": ("finetune_rnnt", "--transducer.prediction=lstm"),
    "batch norm": ("pretrain", "--encoder.convolution_norm=batch_norm"),
    "chunk masks, accumulation": (
        "pretrain", "--encoder.mask=chunk", "--encoder.chunk_size=6", "--encoder.dynamic_chunks=true",
        "--accumulation=2",
    ),
}  # fmt: skip
"""name -> script and settings of a run"""
