"""Integrity check of a dataset: all bytes of its shards against checksums and statistics, and its consistency."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from data.format.dataset import Dataset
from data.format.schema import CHECKSUM_FRAMES, RECORDINGS_FILE, STATISTICS_FILE, shard_name
from data.shards.consistency import Fault, check_header, check_index, check_statistics

# Consecutive bytes per task: large enough that a disk read by several processes rarely seeks.
_CHUNK_BYTES = 64 << 20
# Verifying this much takes as long as starting a process.
_PROCESS_BYTES = 1 << 30
# Relative to the standard deviation, or absolute if that is below 1.
_TOLERANCE = 1e-3

Task = tuple[np.ndarray, bool] | None
"""(recordings of one shard, True to compare their statistics); None is the index."""


def find_faults(dataset: Dataset, workers: int = 1) -> list[Fault]:
    """Read every byte of a dataset in `workers` processes; return the faults of files, then of recordings by id."""
    faults = dict.fromkeys(check_statistics(dataset))
    tasks = [(numbers, not faults) for numbers in _chunks(dataset)]
    with tqdm(
        total=int(dataset.index.bytes.sum()),
        desc="verify",
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    ) as bar:
        for task_faults, size in _results(dataset, tasks, workers):
            faults.update(dict.fromkeys(task_faults))
            bar.update(size)
    return sorted(faults, key=lambda fault: (fault.id is not None, fault.id or "", fault.file, fault.problem))


def _chunks(dataset: Dataset) -> list[np.ndarray]:
    """Recordings in the order of their position on disk, in chunks within one shard."""
    index = dataset.index
    order = np.lexsort((index.offset, index.shard))
    position = np.cumsum(index.bytes[order]) // _CHUNK_BYTES
    edges = np.flatnonzero((np.diff(index.shard[order]) != 0) | (np.diff(position) != 0)) + 1
    return np.split(order, edges)


def _results(dataset: Dataset, tasks: Sequence[Task], workers: int) -> Iterator[tuple[list[Fault], int]]:
    """Results of `_check` for the index and every task, in any order."""
    tasks = [None, *tasks]
    workers = min(workers, len(tasks), int(dataset.index.bytes.sum()) // _PROCESS_BYTES)
    if workers <= 1:
        yield from (_check(dataset, task) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (dataset,))
    try:
        for done in as_completed([pool.submit(_check_in_worker, task) for task in tasks]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{dataset.location}: a worker process was killed, most likely for lack of memory: use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_WORKER: dict[str, Any] = {}


def _start_worker(dataset: Dataset) -> None:
    # Ctrl-C reaches the whole process group; only the main process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _WORKER["dataset"] = dataset


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _check_in_worker(task: Task) -> tuple[list[Fault], int]:
    return _check(_WORKER["dataset"], task)


def _check(dataset: Dataset, task: Task) -> tuple[list[Fault], int]:
    """Faults of a task, and the number of bytes that were read."""
    if task is None:
        return check_index(dataset), 0
    numbers, with_statistics = task
    faults = [*check_header(dataset, numbers), *(check_recording(dataset, int(i), with_statistics) for i in numbers)]
    return [fault for fault in faults if fault is not None], int(dataset.index.bytes[numbers].sum())


def check_recording(dataset: Dataset, recording: int, with_statistics: bool = True) -> Fault | None:
    """Compare a whole recording with its checksums and (with_statistics) its mean and standard deviation."""
    shard, id = shard_name(dataset.index.shard[recording]), None
    try:
        id, place = dataset.id(recording), dataset.place(recording)
        problem = _problem(dataset, recording, with_statistics)
        return None if problem is None else Fault(shard, f"{place}: {problem}", id)
    except UserError as error:
        return Fault(shard if id is not None else RECORDINGS_FILE, str(error), id)


def _problem(dataset: Dataset, recording: int, with_statistics: bool) -> str | None:
    frames, step = int(dataset.frames[recording]), 4 * CHECKSUM_FRAMES
    stored = dataset.mean_std(recording) if with_statistics else np.zeros((2, dataset.features.num_mels), np.float32)
    mismatch = f"its mean and standard deviation are not those in {STATISTICS_FILE}"
    if np.abs(stored).max() > np.finfo(np.float16).max:
        return mismatch
    mean = torch.from_numpy(stored[0])
    sums = torch.zeros(2, dataset.features.num_mels, dtype=torch.float64)  # of x - stored mean, and of its square
    bad: list[int] = []
    for start in range(0, frames, step):
        values = np.empty((min(step, frames - start), dataset.features.num_mels), np.float16)
        dataset.read_into(recording, start, values)
        bad += dataset.bad_blocks(recording, start, values)
        distance = torch.from_numpy(values).float().sub_(mean)
        sums[0] += distance.sum(0)
        sums[1] += distance.square_().sum(0)
    if bad:
        return f"the checksums of blocks {bad} are wrong"
    if not sums.isfinite().all():
        return "NaN or infinite values"
    shift = sums[0] / frames
    std = (sums[1] / frames - shift**2).clamp(min=0).sqrt().numpy()
    error = np.maximum(shift.abs().numpy(), np.abs(std - stored[1]))
    return mismatch if with_statistics and (error > _TOLERANCE * np.maximum(1, std)).any() else None
