"""Readiness of the training and evaluation scripts for a GPU, measured on a CPU with simulated CUDA tensors.

    python -m benchmarks.gpu_readiness                       # all but kernels, about 5 minutes of one core
    python -m benchmarks.gpu_readiness --parts waits host    # single parts: see below

Parts, printed as tables; the last line is JSON:

    waits         waits of the host in an optimizer step by place, of every script, per further micro-batch and
                  codebook: host_syncs_per_step is the largest number of a script (a tiny model; steps that neither
                  log nor save)
    host          processor time of the host in a pretraining step of 4 rows of 6,000 mel frames, by place, without the
                  calls of operators by modules, the backward pass and the optimizer: host_milliseconds_per_step
    combinations  settings that run on the device and on the CPU: simulated_cuda_failures is the number of those that
                  raise an error, or whose losses and gradient norms differ in the first 5 digits
    roofline      counted kernels of a pretraining step of base-120m, and their time on an H100 by a model:
                  estimated_mfu_base_120m with compiled blocks, and estimated_mfu_base_120m_STATE (docs/gpu.md)
    kernels       compiled blocks of shipped recipes, lowered to cubins of an H100 (12 minutes, not run by default):
                  kernels_not_compiled, and the largest shared memory of a kernel

tests/gpu/simulated_cuda.py describes the simulation and its limits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lowered_kernels import RECIPES, lower_recipe
from benchmarks.machine import print_figures
from benchmarks.roofline import measure_roofline
from data.features import FeatureSettings
from tests.gpu.combinations import COMBINATIONS, all_checks, problems
from tests.gpu.host_clock import HostClock
from tests.gpu.simulated_runs import Run, train_on_simulated_cuda, waits_of_a_step
from tests.made_datasets import make_dataset as make_noise
from tests.tiny import make_dataset

MEASURED = ("pretrain", "four codebooks", "ctc", "rnnt", "pruned rnnt and ctc", "tdt")
"""combinations whose waits are counted"""
QUIET = ["--run.steps=4", "--run.log_every=1000"]
"""4 steps, of which the second and third neither log nor save"""
# base-120m with its widths per head, kernel and rows; fewer and narrower layers, whose operators are not measured.
HOST_RUN = [
    *("--data.rows=4", "--data.row_frames=6000", "--data.max_segments=32", "--data.max_seconds=30"),
    *("--encoder.num_mels=16", "--encoder.dim=64", "--encoder.num_layers=2", "--encoder.num_heads=1"),
    *("--encoder.kernel_size=31", "--encoder.subsampling_channels=4", "--quantizer.num_codebooks=4", "--run.steps=6"),
    *(
        "--encoder.feedforward_dim=16",
        "--encoder.dropout=0.1",
        "--encoder.attention_dropout=0.1",
        "--run.log_every=1000",
    ),
]


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function without its output on the console."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args, **kwargs)


def count_waits(dataset: Path, folder: Path, only: Collection[str] = ()) -> dict[str, Any]:
    """Print and return the waits of the host in a step of every script."""
    figures: dict[str, Any] = {"host_syncs_per_step": 0, "host_syncs": {}}
    steps: dict[str, Counter[tuple[str, str]]] = {}
    for name in [name for name in MEASURED if not only or name in only]:
        script, *options = COMBINATIONS[name]
        for accumulation in (1, 2):
            run: Run = quietly(
                train_on_simulated_cuda, script, dataset, folder / f"{name} {accumulation}", *options, *QUIET,
                f"--accumulation={accumulation}",
            )  # fmt: skip
            steps[f"{name} {accumulation}"] = waits_of_a_step(run)
        total, twice = (sum(steps[f"{name} {accumulation}"].values()) for accumulation in (1, 2))
        figures["host_syncs"][name] = {"per_step": total, "per_further_micro_batch": twice - total}
        figures["host_syncs_per_step"] = max(figures["host_syncs_per_step"], total)
        print(f"\n{name}: {total} waits of the host per step, {twice - total} per further micro-batch")
        print_waits(steps[f"{name} 1"])
    if {"pretrain 1", "four codebooks 1"} <= steps.keys():
        one, four = (sum(steps[f"{name} 1"].values()) for name in ("pretrain", "four codebooks"))
        figures["host_syncs_per_further_codebook"] = round((four - one) / 3, 2)
        print(f"\n{figures['host_syncs_per_further_codebook']} waits per further codebook", flush=True)
    return figures


def print_waits(waits: Counter[tuple[str, str]]) -> None:
    """Print waits by place, most first."""
    for (reason, where), count in waits.most_common():
        print(f"{count:5d}  {where:70} {reason}", flush=True)


def measure_host(folder: Path) -> dict[str, Any]:
    """Print and return the host's time in a pretraining step of 4 rows of 6,000 frames."""
    lengths = np.random.default_rng(0).integers(600, 2400, size=60)  # 6 to 24 s: about four to a row
    # The host's work does not depend on the mel bins; with 80, it would include the release of large arrays by the CPU.
    make_noise(folder / "noise", [int(length) for length in lengths], 50_000_000, FeatureSettings(num_mels=16))
    run: Run = quietly(
        train_on_simulated_cuda, "pretrain", folder / "noise", folder / "host", *HOST_RUN, measure_host=True
    )
    clocks = sorted(run.clocks[1:], key=lambda clock: sum(clock.own.values()))
    middle: HostClock = clocks[len(clocks) // 2]
    own = [1000 * sum(clock.own.values()) for clock in clocks]
    print(f"\nhost: {statistics.median(own):.2f} ms per step of 4 x 6,000 frames ({own[0]:.2f} to {own[-1]:.2f})")
    for where, seconds in sorted(middle.own.items(), key=lambda item: -item[1])[:12]:
        print(f"{1000 * seconds:8.2f} ms  {where}")
    launching = 1000 * sum(middle.launching.values())
    print(f"calls of operators by modules, backward pass and optimizer (2 layers): {launching:.1f} ms", flush=True)
    return {"host_milliseconds_per_step": round(statistics.median(own), 2)}


def count_failures(dataset: Path, folder: Path, only: Collection[str] = ()) -> dict[str, Any]:
    """Run all combinations; print and return those that fail."""
    failed: dict[str, list[str]] = {}
    checks = {name: check for name, check in all_checks(dataset, folder).items() if not only or name in only}
    for name, check in checks.items():
        with contextlib.redirect_stderr(io.StringIO()):
            found = quietly(problems, check)
        print(f"{name}: {'as on the CPU' if not found else '; '.join(found[:3])}", flush=True)
        if found:
            failed[name] = found
    return {"simulated_cuda_failures": len(failed), "combinations": len(checks), "failed": sorted(failed)}


def count_kernels() -> dict[str, Any]:
    """Lower the blocks of all recipes; print and return the kernels that fail and the largest shared memory."""
    total: dict[str, Any] = {"kernels": 0, "kernels_not_compiled": 0, "largest_shared_bytes": 0}
    for name, backend in RECIPES:
        figures = lower_recipe(name, backend)
        for key in ("kernels", "kernels_not_compiled"):
            total[key] += figures[key]
        total["largest_shared_bytes"] = max(total["largest_shared_bytes"], figures["largest_shared_bytes"])
        print(f"{name} {backend}: {figures}", flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("waits", "host", "combinations", "roofline")
    parser.add_argument("--parts", nargs="+", choices=(*names, "kernels"), default=names, help="parts to run")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="combinations to run, such as pretrain")
    args = parser.parse_args()
    if torch.cuda.is_available():
        parser.error("a GPU is here; the simulation needs a machine without one: set CUDA_VISIBLE_DEVICES= (empty)")

    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dataset = make_dataset(folder / "data", recordings=20, long_seconds=4.0)
        if "waits" in args.parts:
            figures |= count_waits(dataset, folder / "waits", args.only)
        if "host" in args.parts:
            figures |= measure_host(folder)
        if "combinations" in args.parts:
            figures |= count_failures(dataset, folder / "combinations", args.only)
        if "roofline" in args.parts:
            figures |= measure_roofline()
    if "kernels" in args.parts:
        figures |= count_kernels()
    print_figures(figures, "float32")


if __name__ == "__main__":
    main()
