"""Share of an optimizer step that is neither forward, backward nor the optimizer, at the size of the quickstart.

    python -m benchmarks.loop_overhead
    python -m benchmarks.loop_overhead --config configs/base-120m.yaml --steps 20

Runs `pretrain.py` itself on made features (noise takes the same time as speech), without validation, and times its
parts. Forward includes the targets and the noise of the masked frames, which are of the objective; the optimizer
includes the gradient norm, clipping and the check for non-finite gradients. The last line is JSON: `overhead_share`,
and its parts, `data_share` (waiting for the loader) and `rest_share` (seeds, learning rate, counters, logging); and,
to count otherwise, `targets_share` and `clipping_share`, which are in forward and optimizer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import pretrain
from benchmarks.machine import hardware_precision, print_figures
from bestrq.pretraining.objective import BestRQ
from bestrq.training import optimizer
from bestrq.training.meters import Throughput
from bestrq.training.optimizer import StepGuard
from common.config import parse
from data.features import FeatureSettings
from data.format.writer import DatasetWriter
from data.recording import Recording

WARMUP = 10
"""first steps, which are not timed"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart-pretrain.yaml", help="settings of a pretraining")
    parser.add_argument("--steps", type=int, default=100, help="timed optimizer steps")
    parser.add_argument("--hours", type=float, default=0.5, help="audio in the made dataset")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = make_dataset(Path(folder) / "dataset", options.hours)
        settings = {
            "data.dataset": made, "run.folder": f"{folder}/run", "run.steps": WARMUP + options.steps,
            "validation.every_steps": 10**9, "checkpoint.every_steps": 10**9,
        }  # fmt: skip
        config = parse(pretrain.Config, [f"--config={options.config}", *(f"--{k}={v}" for k, v in settings.items())])
        shares = measure(config)
    print_figures({"benchmark": "loop_overhead", "config": options.config, **shares}, hardware_precision())


def make_dataset(path: Path, hours: float) -> Path:
    """Dataset of noise in recordings of 2 to 12 s."""
    generator, features = np.random.default_rng(0), FeatureSettings()
    with DatasetWriter(path, features) as writer:
        seconds, number = 3600 * hours, 0
        while seconds > 0:
            length = generator.uniform(2, 12)
            frames = generator.normal(size=(int(100 * length), features.num_mels)).astype(np.float32)
            writer.add(Recording(f"{number:06d}", split="train" if number % 20 else "dev"), frames)
            seconds, number = seconds - length, number + 1
        writer.finish()
    return path


def measure(config: pretrain.Config) -> dict[str, float]:
    """Shares of the time of the steps after the warm-up."""
    times: defaultdict[str, float] = defaultdict(float)
    ends: list[float] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                times[name] += time.perf_counter() - start

        return wrapper

    apply = StepGuard.apply

    def end_of_step(*arguments: Any) -> Any:
        result = apply(*arguments)
        ends.append(time.perf_counter())
        if len(ends) == WARMUP:
            times.clear()
        return result

    waiting = Throughput.waiting

    @contextmanager
    def timed_waiting(throughput: Throughput) -> Iterator[None]:
        start = time.perf_counter()
        with waiting(throughput):
            yield
        times["data"] += time.perf_counter() - start

    patches: list[Any] = [
        mock.patch.object(BestRQ, "forward", timed("model", BestRQ.forward)),
        mock.patch.object(torch.Tensor, "backward", timed("backward", torch.Tensor.backward)),
        mock.patch.object(torch.optim.AdamW, "step", timed("step", torch.optim.AdamW.step)),
        mock.patch.object(optimizer, "update_weights", timed("optimizer", optimizer.update_weights)),
        mock.patch.object(pretrain, "masked_rows", timed("targets", pretrain.masked_rows)),
        mock.patch.object(Throughput, "waiting", timed_waiting),
        mock.patch.object(StepGuard, "apply", end_of_step),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        pretrain.train(config)
    total = ends[-1] - ends[WARMUP - 1]
    share = {name: seconds / total for name, seconds in times.items()}
    share["forward"] = share["model"] + share["targets"]
    share["clipping"] = share["optimizer"] - share["step"]
    share["overhead"] = 1 - share["forward"] - share["backward"] - share["optimizer"]
    share["rest"] = share["overhead"] - share["data"]
    names = ("overhead", "data", "rest", "forward", "backward", "optimizer", "targets", "clipping")
    return {f"{name}_share": round(share[name], 4) for name in names} | {
        "step_ms": round(1e3 * total / (len(ends) - WARMUP), 2)
    }


if __name__ == "__main__":
    main()
