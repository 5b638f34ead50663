"""Is a dataset whole: its files, every byte in them, and whether they belong together."""

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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from data.format import index as ix
from data.shards.consistency import Fault, check_header, check_index, check_statistics

if TYPE_CHECKING:
    from data.format.dataset import Dataset

DAMAGED = "`python -m data.shards verify` lists all damage; restore the file or prepare the dataset again"
# Read by one process in one go, and therefore in order: enough that a disk is not made to jump.
_CHUNK_BYTES = 64 << 20
# A process takes as long to begin as it takes to verify this much.
_PROCESS_BYTES = 1 << 30
# Relative to the standard deviation, and to 1 where that is smaller.
_TOLERANCE = 1e-3


def check_files(dataset: Dataset) -> None:
    """Raise UserError that names every missing shard, or the shards cut short and the recordings beyond the cut."""
    end = dataset.index.offset + dataset.index.bytes
    beyond = np.flatnonzero(end > _sizes(dataset)[dataset.index.shard])
    if len(beyond):
        shards = sorted({ix.shard_name(shard) for shard in dataset.index.shard[beyond].tolist()})
        named = ", ".join(repr(dataset.id(recording)) for recording in beyond[:8])
        raise UserError(
            f"{dataset.location}: {', '.join(shards[:8])} cut short: {len(beyond)} recordings are not there whole "
            f"({named}{', ...' if len(beyond) > 8 else ''}); {DAMAGED}"
        )


def _sizes(dataset: Dataset) -> np.ndarray:
    """Bytes of every shard's file, by its number. Raises UserError where one is missing or no plain file."""
    shards = dataset.shards()
    sizes, missing = np.zeros(shards[-1] + 1, np.int64), []
    for shard in shards:
        name = ix.shard_name(shard)
        if (dataset.path / name).is_symlink():
            raise UserError(f"{dataset.path / name} is a symbolic link; a shard must be a file in its folder. Refused")
        size = dataset.storage.size(name)
        if size is None:
            missing.append(name)
        sizes[shard] = size or 0
    if missing:
        raise UserError(f"{dataset.path}: {len(missing)} shards are missing: {', '.join(missing[:8])}; {DAMAGED}")
    return sizes


def verify(dataset: Dataset, workers: int = 1) -> list[str]:
    """Read every byte of a dataset against its checksums, and check its index; a line for everything that is wrong."""
    return [fault.problem for fault in faults(dataset, workers)]


def faults(dataset: Dataset, workers: int = 1) -> list[Fault]:
    """As `verify`, sorted: of files first, then of recordings by id. The work is shared by `workers` processes."""
    found = dict.fromkeys(check_statistics(dataset))
    tasks = [(numbers, not found) for numbers in _chunks(dataset)]
    with tqdm(
        total=int(dataset.index.bytes.sum()),
        desc="verify",
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    ) as bar:
        for some, size in _results(dataset, tasks, workers):
            found.update(dict.fromkeys(some))
            bar.update(size)
    return sorted(found, key=lambda fault: (fault.id is not None, fault.id or "", fault.file, fault.problem))


Task = tuple[np.ndarray, bool] | None
"""(recordings of one shard, whether their statistics can be compared); None stands for the index."""


def _chunks(dataset: Dataset) -> list[np.ndarray]:
    """The recordings in the order in which they lie on the disk, in stretches of one shard."""
    index = dataset.index
    order = np.lexsort((index.offset, index.shard))
    position = np.cumsum(index.bytes[order]) // _CHUNK_BYTES
    edges = np.flatnonzero((np.diff(index.shard[order]) != 0) | (np.diff(position) != 0)) + 1
    return np.split(order, edges)


def _results(dataset: Dataset, tasks: Sequence[Task], workers: int) -> Iterator[tuple[list[Fault], int]]:
    """What `_check` found in each task and in the index, in any order."""
    tasks = [None, *tasks]
    workers = min(workers, len(tasks), int(dataset.index.bytes.sum()) // _PROCESS_BYTES)
    if workers <= 1:
        yield from (_check(dataset, task) for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, _begin, (dataset,))
    try:
        for done in as_completed([pool.submit(_check_here, task) for task in tasks]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{dataset.location}: a process that verified was killed, most likely for want of memory: use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_HERE: dict[str, Any] = {}


def _begin(dataset: Dataset) -> None:
    """The first step of a worker process."""
    # Ctrl-C reaches the whole process group: the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _HERE["dataset"] = dataset


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _check_here(task: Task) -> tuple[list[Fault], int]:
    return _check(_HERE["dataset"], task)


def _check(dataset: Dataset, task: Task) -> tuple[list[Fault], int]:
    """Faults of a task, and the bytes of sound that were looked at."""
    if task is None:
        return check_index(dataset), 0
    numbers, with_statistics = task
    found = [*check_header(dataset, numbers), *(check_recording(dataset, int(i), with_statistics) for i in numbers)]
    return [fault for fault in found if fault is not None], int(dataset.index.bytes[numbers].sum())


def damage(dataset: Dataset, recording: int) -> str | None:
    """Read a whole recording against its checksums and its statistics; what is wrong with it, or None."""
    fault = check_recording(dataset, recording)
    return None if fault is None else fault.problem


def check_recording(dataset: Dataset, recording: int, with_statistics: bool = True) -> Fault | None:
    """As `damage`. with_statistics: also compare its mean and standard deviation with what is stored."""
    shard, id = ix.shard_name(dataset.index.shard[recording]), None
    try:
        id, where = dataset.id(recording), dataset.where(recording)
        problem = _problem(dataset, recording, with_statistics)
        return None if problem is None else Fault(shard, f"{where}: {problem}", id)
    except UserError as error:
        return Fault(shard if id is not None else ix.RECORDINGS_FILE, str(error), id)


def _problem(dataset: Dataset, recording: int, with_statistics: bool) -> str | None:
    frames, step = int(dataset.frames[recording]), 4 * ix.CHECKSUM_FRAMES
    stored = dataset.mean_std(recording) if with_statistics else np.zeros((2, dataset.features.num_mels), np.float32)
    unlike = f"its mean and standard deviation are not those in {ix.STATISTICS_FILE}"
    if np.abs(stored).max() > np.finfo(np.float16).max:
        return unlike
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
    return unlike if with_statistics and (error > _TOLERANCE * np.maximum(1, std)).any() else None
