"""Throughput of the data loader for rows with masks: `python -m benchmarks.loader_speed`.

A synthetic dataset (random float16; utterances of 2 to 17 s and some recordings of 10 minutes) is written to a
temporary folder, so the page cache is warm; the loader then runs with one worker and with two, alternating, with the
masks of pretraining. The rate counts seconds of audio, without padding, that arrive in the main process. Finally, many
small batches are loaded to measure the growth of the private memory of all processes, from the first tenth of the
batches to the last batch. The last line is JSON.

`bare_conversion` is the rate of torch's conversion of float16 to float32 in one thread, and `bare_normalisation` that
of conversion and normalisation into as many buffers as in the loader; `share_of_...` is the rate of a worker, which
also reads, checks and draws masks, relative to these rates at the same fill of the rows.

The main process, which plans and receives batches, needs a quarter of a processor. On two processors, two workers
therefore cannot be twice as fast as one; `scaling_2_workers_with_processors_of_their_own` is derived from the processor
time of the workers instead.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import itertools
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.machine import print_figures
from benchmarks.memory import family, memory, processor_seconds
from bestrq.pretraining.masking import draw_span_mask
from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.schema import ENCODINGS, Encoding
from data.format.writer import DatasetWriter
from data.loading.batch import SharedBuffers
from data.loading.loader import LoaderSettings, RowLoader
from data.loading.rows import Row
from data.recording import Recording


def write_synthetic(folder: str, hours: float, encoding: Encoding = "plain", seed: int = 0) -> Dataset:
    """Write random log-mel: 90 % of the time in utterances of 2 to 17 s, 10 % in recordings of 10 minutes."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(-5, 3, size=(60_000, 80)).astype(np.float16)
    with DatasetWriter(folder, FeatureSettings(), encoding=encoding) as writer:
        total, number = 0, 0
        while total < hours * 360_000:
            frames = 60_000 if number % 600 == 0 else int(rng.integers(200, 1700))
            first = int(rng.integers(0, 60_001 - frames))
            writer.add(Recording(f"r{number:06d}"), noise[first : first + frames])
            total, number = total + frames, number + 1
        writer.finish()
    return open_dataset(folder)


def loader(dataset: Dataset, options: argparse.Namespace, num_workers: int) -> RowLoader:
    """Loader with the masks of pretraining."""
    settings = LoaderSettings(
        row_frames=options.row_frames,
        rows=options.rows,
        num_workers=num_workers,
        prefetch=options.prefetch,
        max_seconds=20.0,
    )
    # 40 frames are 400 ms; a start probability of 0.01 per frame masks a third.
    draw_mask = functools.partial(draw_span_mask, span_frames=40, start_probability=0.01)
    return RowLoader(dataset, settings.crop_order(dataset), settings, multiple=4, row_gap=4, draw_mask=draw_mask)


def measure(dataset: Dataset, options: argparse.Namespace, num_workers: int) -> tuple[float, float]:
    """Audio-seconds per second, and per second of processor time of the workers, after a warm-up."""
    seconds, start, work_seconds = 0.0, 0.0, 0.0
    for number, (batch,) in enumerate(loader(dataset, options, num_workers)):
        if number == options.warm_up:
            start, work_seconds = time.perf_counter(), processor_seconds(family()[1:])
        elif number > options.warm_up:
            seconds += int(batch.segments.length.sum()) / 100
            if number == options.warm_up + options.updates:
                work_seconds = processor_seconds(family()[1:]) - work_seconds
                break
    return seconds / (time.perf_counter() - start), seconds / max(work_seconds, 0.01)


def growth(dataset: Dataset, options: argparse.Namespace) -> float:
    """Growth of the private memory of this process and its workers over many small batches, in megabytes."""
    settings = LoaderSettings(row_frames=400, rows=2, max_seconds=4.0, num_workers=2)
    small = RowLoader(dataset, settings.crop_order(dataset), settings, multiple=4, row_gap=4)
    before = 0
    for number, _ in enumerate(small):
        if number == options.growth_batches // 10:
            before = memory(family(), "Pss_Anon")
        if number == options.growth_batches:
            break
    return (memory(family(), "Pss_Anon") - before) / 1e6


def bare_speeds(options: argparse.Namespace) -> tuple[float, float]:
    """Audio-seconds per second in one thread: conversion from float16 to float32, and conversion with normalisation.

    The latter is row by row, into as many buffers as a worker of the loader cycles through.
    """
    torch.set_num_threads(1)
    shape = (options.rows, options.row_frames, 80)
    source, mean, inverse_std = torch.zeros(shape, dtype=torch.float16), torch.zeros(80), torch.ones(80)
    buffers = itertools.cycle(SharedBuffers(options.prefetch + 2, shape).buffers)

    def normalise() -> None:
        for out, values in zip(next(buffers), source, strict=True):
            out.copy_(values).sub_(mean).mul_(inverse_std)

    rates = []
    for action in (lambda: source.to(torch.float32), normalise):
        times = []
        for _ in range(40):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        rates.append(options.rows * options.row_frames / 100 / statistics.median(times))
    return rates[0], rates[1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader_speed", description=__doc__)
    parser.add_argument("--hours", type=float, default=10.0, help="audio in the synthetic dataset")
    parser.add_argument("--row-frames", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--updates", type=int, default=150, help="steps per measurement")
    parser.add_argument("--warm-up", type=int, default=8, help="steps before a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefetch", type=int, default=4, help="batches that every worker prefetches")
    parser.add_argument("--growth-batches", type=int, default=100_000, help="batches of the memory measurement")
    parser.add_argument("--layout", choices=ENCODINGS, default="plain", help="layout of the dataset")
    parser.add_argument("--profile", action="store_true", help="print a profile of one process")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_synthetic(folder, options.hours, options.layout)
        if options.profile:
            profiler = cProfile.Profile()
            profiler.runcall(measure, dataset, options, 0)
            pstats.Stats(profiler).sort_stats("tottime").print_stats(18)
        plans = loader(dataset, options, 0)
        start = time.perf_counter()
        planned = 0.0
        for _, (rows, _state) in zip(range(options.updates), plans.batch_rows_and_states(), strict=False):
            planned += _seconds(rows)
        planning = planned / (time.perf_counter() - start)
        rates, scaling, work_scaling = [], [], []
        for _ in range(options.repeats):
            (rate_1, work_rate_1), (rate_2, work_rate_2) = (measure(dataset, options, n) for n in (1, 2))
            rates.append(rate_1)
            scaling.append(rate_2 / rate_1)
            work_scaling.append(2 * work_rate_2 / work_rate_1)
            print(f"RTFx {rate_1:,.0f} with one worker, {rate_2:,.0f} with two", flush=True)
        fill = planned * 100 / (options.updates * options.rows * options.row_frames)
        bare, normalised = bare_speeds(options)
        figures = {
            "audio_seconds_per_second_per_worker": round(statistics.median(rates)),
            "scaling_2_workers": round(statistics.median(scaling), 2),
            "scaling_2_workers_with_processors_of_their_own": round(statistics.median(work_scaling), 2),
            "processors": len(os.sched_getaffinity(0)),
            "lowest": round(min(rates)),
            "highest": round(max(rates)),
            "in_process": round(statistics.median(measure(dataset, options, 0)[0] for _ in range(3))),
            "planning_alone": round(planning),
            "bare_conversion": round(bare),
            "bare_normalisation": round(normalised),
            "share_of_bare_conversion": round(statistics.median(rates) / (fill * bare), 4),
            "share_of_bare_normalisation": round(statistics.median(rates) / (fill * normalised), 4),
            "row_fill": round(fill, 4),
            "growth_mb": round(growth(dataset, options), 1),
            "growth_batches": options.growth_batches,
            "layout": options.layout,
        }
    print_figures(figures, "float32", threads=1)


def _seconds(rows: list[Row]) -> float:
    """Seconds of audio in the rows."""
    return sum(int((row.crops.stop - row.crops.start).sum()) for row in rows) / 100


if __name__ == "__main__":
    main()
