"""Largest number of rows that fit: counted by dry runs for a GPU of a given memory, or measured on a GPU.

Nothing is read but the settings, and nothing is written. docs/memory.md explains the figures.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bestrq.model.activation_checkpointing import MODES
from bestrq.training.process import World, start_world
from common.errors import UserError
from pipelines.dry_run import count_step
from pipelines.kernels import compile_encoder
from pipelines.trial_step import Config, Shape, TrialStep, resolved, shape_of

COUNTED_SHARE = 0.9
"""of the memory of a GPU is for tensors: the rest is for CUDA, its libraries, workspaces and fragmentation, none of
which a dry run counts (docs/memory.md)"""
MEASURED_SHARE = 0.95
"""of the memory of the GPU may be reserved in a trial: the rest is for NCCL and for batches of other lengths"""
MOST_ROWS = 4096
"""rows per process up to which the search goes"""


@dataclass(frozen=True)
class Fit:
    """Largest number of rows with one mode of activation checkpointing."""

    mode: str
    rows: int
    """per process and micro-batch; 0: not even one row fits"""
    bytes: float
    """peak with these rows, or with one row if none fits; infinite if unknown"""


def largest_rows(needed: Callable[[int], float], budget: float, most: int = MOST_ROWS) -> tuple[int, float]:
    """Largest number of rows whose bytes are within the budget, and these bytes.

    `needed` is not decreasing, nearly linear, and infinite if memory runs out; it is called as few times as possible.
    """
    low, low_bytes = 1, needed(1)
    if low_bytes > budget:
        return 0, low_bytes
    high, guess, slope = most + 1, 2, 0.0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        value = needed(guess)
        if value <= budget:
            slope, low, low_bytes = (value - low_bytes) / (guess - low), guess, value
        elif math.isinf(value):
            high, slope = guess, 0.0
        else:
            high, slope = guess, (value - low_bytes) / (guess - low)
        # Without a slope, after an out-of-memory error, the interval is halved.
        guess = low + int((budget - low_bytes) / slope) if slope else (low + high) // 2
    return low, low_bytes


def counted_bytes(config: Config, shape: Shape, processes: int, shards: int) -> Callable[[int], float]:
    """Peak of a dry run by the number of rows."""
    return lambda rows: float(count_step(config, replace(shape, rows=rows), processes, shards).peak)


def measured_bytes(config: Config, shape: Shape, world: World, replicated: bool) -> Callable[[int], float]:
    """Memory that torch reserves on the GPU in two steps, by the number of rows; infinite if it runs out."""

    def needed(rows: int) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
        try:
            step = TrialStep(config, replace(shape, rows=rows), world, 1, replicated, compile_encoder)
            step.run()
            step.run()
            torch.cuda.synchronize(world.device)
            return float(torch.cuda.max_memory_reserved(world.device))
        except torch.OutOfMemoryError:
            return math.inf
        finally:
            step = None  # type: ignore[assignment]
            gc.collect()

    return needed


def find_counted(config: Config, memory_gib: float, processes: int, local_size: int) -> list[Fit]:
    """Largest rows in every mode of activation checkpointing, by dry runs."""
    config, shards = resolved(config, processes, local_size)
    shape, fits = one_row(config), []
    for mode in MODES:
        encoder = replace(config.encoder, activation_checkpointing=mode)
        needed = counted_bytes(replace(config, encoder=encoder), shape, processes, shards)
        fits.append(Fit(mode, *largest_rows(needed, COUNTED_SHARE * memory_gib * 2**30)))
    return fits


def find_measured(config: Config, processes: int) -> list[Fit]:
    """Largest rows in the mode of the settings, by trials on the GPU of this process.

    Raises UserError without a GPU, under a launcher, and for sharded weights, which need all processes.
    """
    world = start_world(config.distributed)
    if world.size > 1 or world.device.type != "cuda":
        place = f"{world.size} processes" if world.size > 1 else "a CPU"
        raise UserError(f"--fit measures with one process on a GPU, not {place}: give --fit.memory_gib, such as 24")
    config, shards = resolved(config, processes, processes)
    if shards > 1:
        raise UserError(
            f"--fit measures whole weights on one GPU, but distributed.strategy is {config.distributed.strategy!r} for "
            f"{processes} processes: give --fit.memory_gib, the memory of a GPU in GiB, for dry runs"
        )
    budget = MEASURED_SHARE * torch.cuda.get_device_properties(world.device).total_memory
    needed = measured_bytes(config, one_row(config), world, processes > 1)
    return [Fit(config.encoder.activation_checkpointing, *largest_rows(needed, budget))]


def one_row(config: Config) -> Shape:
    """Shape of a micro-batch of one row."""
    alone = replace(config, accumulation=1, data=replace(config.data, rows=1), curriculum=[])  # type: ignore[arg-type]
    return shape_of(alone, 1)


def settings_for(rows: int, fitting: int, processes: int) -> tuple[int, int]:
    """Rows per step, as near as possible to `rows` and not fewer, and accumulation, the smallest that fits.

    Args:
        fitting: rows that fit in a process, 1 or more.
    """
    accumulation = -(-rows // (processes * fitting))
    shares = processes * accumulation
    return -(-rows // shares) * shares, accumulation


def report(config: Config, memory_gib: float, processes: int, local_size: int) -> dict[str, Any]:
    """Find the rows that fit, print a table and the settings to use; returns the figures as JSON values."""
    fits = find_counted(config, memory_gib, processes, local_size) if memory_gib else find_measured(config, processes)
    data, origin = config.data, f"counted, for {memory_gib:g} GiB" if memory_gib else "measured on this GPU"
    print(f"Rows of {data.row_frames:,} mel frames per process and micro-batch ({origin}), {processes} processes\n")
    print(f"{'activation_checkpointing':<26}{'rows':>6}{'rows x frames':>16}{'peak (GB)':>12}{'data.rows':>12}"
          f"{'accumulation':>14}")  # fmt: skip
    figures = []
    for fit in fits:
        total, accumulation = settings_for(data.rows, fit.rows, processes) if fit.rows else (0, 0)
        figures.append({"activation_checkpointing": fit.mode, "rows": fit.rows, "row_frames": data.row_frames,
                        "peak": fit.bytes if math.isfinite(fit.bytes) else None, "data.rows": total,
                        "accumulation": accumulation})  # fmt: skip
        print(f"{fit.mode:<26}{fit.rows:>6,}{fit.rows * data.row_frames:>16,}{fit.bytes / 1e9:>12.2f}{total:>12,}"
              f"{accumulation:>14,}")  # fmt: skip
    print("\n" + advice(figures, config, processes))
    result = {"processes": processes, "fits": figures}
    print("\n" + json.dumps(result))
    return result


def advice(figures: list[dict[str, Any]], config: Config, processes: int) -> str:
    """Settings to use: those of the recipe if a row fits, or the first mode that needs less memory."""
    modes = [entry["activation_checkpointing"] for entry in figures]
    chosen = figures[modes.index(config.encoder.activation_checkpointing) :]
    entry = next((entry for entry in chosen if entry["rows"]), None)
    if entry is None:
        return "No row fits: lower data.row_frames, or shard the weights (distributed.strategy fsdp)."
    arguments = f"--data.rows {entry['data.rows']} --accumulation {entry['accumulation']}"
    mode = entry["activation_checkpointing"]
    if mode != config.encoder.activation_checkpointing:
        arguments += f" --encoder.activation_checkpointing {mode}"
    return f"Settings: {arguments} (at most --data.rows {entry['rows'] * processes} with --accumulation 1)"
