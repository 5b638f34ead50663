"""Efficiency of two processes against one, with one core each, and a projection to clusters.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --gpus 8 --config configs/base-120m.yaml     # on a node with GPUs: 1, 2, 4 and 8

Runs `pretrain.py` itself on made features, with rows per process constant (weak scaling): by one process, by several
with DDP, with FSDP2, and with FSDP2 that keeps gathered weights until the end of a step (`distributed.reshard false`),
in turns. Efficiency is the audio per second of n processes divided by n times that of one.
A process has as much audio in a step as a GPU of base-120m on 8 GPUs, four minutes; with less, collectives weigh more
(`--rows 2`: the batch of the quickstart).

The last line is JSON: `ddp_efficiency`, `fsdp_efficiency` and `fsdp_kept_efficiency` of the largest world, `ddp_bytes`,
`fsdp_bytes` and `fsdp_kept_bytes` that a rank sends in a step by the formulas of ring collectives ((n - 1) / n of 4
bytes per parameter: twice for the all-reduce of DDP, three times for the two gathers and the reduction of FSDP2, one
less if weights are kept), and `projection`, the efficiency of DDP on 8 to 512 GPUs. Assumptions of the projection, all
of them options: seconds of a step on one GPU; bandwidth per GPU within a node of 8 (NVLink) and between nodes; a
hierarchical all-reduce, of which backward hides all but the last bucket (25 MiB) as long as it takes less time than
backward, two thirds of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.loop_overhead import make_dataset
from benchmarks.machine import hardware_precision, print_figures
from bestrq.training.tensor_reading import read_group
from common.cores import available_cores

VARIANTS = {
    "ddp": {"distributed.strategy": "ddp"},
    "fsdp": {"distributed.strategy": "fsdp"},
    "fsdp_kept": {"distributed.strategy": "fsdp", "distributed.reshard": "false"},
}
BUCKET = 25 << 20
"""bytes of a bucket of DDP"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart-pretrain.yaml", help="settings of a pretraining")
    parser.add_argument("--gpus", type=int, default=0, help="largest number of GPUs; 0: two processes on the CPU")
    parser.add_argument("--rows", type=int, default=20, help="rows per process")
    parser.add_argument("--steps", type=int, default=36, help="optimizer steps of a run")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind, in turns")
    parser.add_argument("--step-seconds", type=float, default=0.35, help="projection: step of one GPU")
    parser.add_argument("--parameters", type=float, default=120e6, help="projection: parameters")
    parser.add_argument("--node-bandwidth", type=float, default=300e9, help="projection: bytes per second in a node")
    parser.add_argument("--network-bandwidth", type=float, default=50e9, help="projection: bytes per second per GPU")
    options = parser.parse_args()
    sizes = [n for n in (1, 2, 4, 8) if n <= options.gpus] if options.gpus else [1, 2]
    kinds = [("ddp", 1)] + [(variant, size) for size in sizes[1:] for variant in VARIANTS]
    speeds: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = make_dataset(folder / "dataset", 0.5)
        for repeat in range(options.repeats):
            for variant, size in kinds:
                run = folder / f"{variant}-{size}-{repeat}"
                speeds[variant, size].append(speed(run, dataset, variant, size, options))
                print(f"{variant} on {size}: RTFx {speeds[variant, size][-1]:.0f}", flush=True)
        parameters = parameters_of(folder / "ddp-1-0")
    best = {kind: statistics.median(values) for kind, values in speeds.items()}
    largest = sizes[-1]
    figures = {
        f"{variant}_efficiency": round(best[variant, largest] / (largest * best["ddp", 1]), 3) for variant in VARIANTS
    }
    sent = (largest - 1) / largest * 4 * parameters
    figures |= {"ddp_bytes": round(2 * sent), "fsdp_bytes": round(3 * sent), "fsdp_kept_bytes": round(2 * sent)}
    projection = {gpus: round(projected(gpus, options), 3) for gpus in (8, 16, 64, 256, 512)}
    print_figures(
        {"benchmark": "scaling", "processes": largest, **figures, "projection": projection}, hardware_precision(), 1
    )


def speed(run: Path, dataset: Path, variant: str, size: int, options: argparse.Namespace) -> float:
    """Median audio seconds per second of a run of `size` processes, after its first third."""
    settings = {
        "config": options.config, "data.dataset": dataset, "run.folder": run, "run.steps": options.steps,
        "data.rows": options.rows * size, "run.log_every": 4, **VARIANTS[variant],
        "validation.every_steps": 10**9, "checkpoint.every_steps": 10**9, "quantizer.pca_steps": 0,
        "distributed.threads": 0 if options.gpus else 1, "distributed.bind_cpus": "false",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "pretrain.py"]
    cores = available_cores()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    bound = ["taskset", "-c", "0"] if size == 1 and not options.gpus and cores > 1 else []
    done = subprocess.run(
        [*bound, *command, *(f"--{name}={value}" for name, value in settings.items())],
        env=environment, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the run on {size} processes failed:\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [row["audio_seconds_per_second"] for row in rows if row["kind"] == "train"]
    return statistics.median(rates[len(rates) // 3 :])


def parameters_of(run: Path) -> int:
    """Trained parameters of a run, by its checkpoint."""
    [checkpoint] = (run / "checkpoints").glob("step-*")
    return sum(tensor.numel() for tensor in read_group(checkpoint, "model").values())


def projected(gpus: int, options: argparse.Namespace) -> float:
    """Efficiency of DDP by the assumptions of the module's docstring."""
    gradients, nodes = 4 * options.parameters, max(1, gpus // 8)
    within = 2 * (min(gpus, 8) - 1) / min(gpus, 8) * gradients / options.node_bandwidth
    between = 2 * (nodes - 1) / nodes * gradients / 8 / options.network_bandwidth
    communication = within + between
    exposed = communication * BUCKET / gradients + max(0.0, communication - 2 / 3 * options.step_seconds)
    return options.step_seconds / (options.step_seconds + exposed)


if __name__ == "__main__":
    main()
