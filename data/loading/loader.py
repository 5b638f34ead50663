"""Rows to batches. The main process plans (integers only), workers read, normalise and place frames.

A plan says everything about a batch, so which worker makes it, or whether there are workers at all, cannot matter.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.errors import UserError
from common.segments import Segments
from data.format.dataset import Dataset
from data.loading.batch import Batch, DrawMask, Job, Reading, RowReader, SharedRows
from data.loading.loader_settings import FREE_LOADER_FIELDS, LOADER_PLACES, LoaderSettings
from data.loading.order import CropTable
from data.loading.rows import DataState, Row, RowStream

__all__ = ["FREE_LOADER_FIELDS", "LOADER_PLACES", "Batch", "DataState", "DrawMask", "LoaderSettings", "RowLoader"]


@dataclass(frozen=True)
class Plan:
    """A batch before it is read: its rows, and the state after its update."""

    rows: list[Row]
    state: DataState


class RowLoader:
    """Iterates over updates for ever; each is a list of `accumulation` Batches, this rank's share of the update's rows.

    The rows of update s are the same for any world size, accumulation and number of workers: rank r has the r-th
    contiguous share, its accumulation steps in order.

    Args:
        dataset: the opened dataset.
        crops: the order (`settings.crop_order(dataset)`, or `supervised_crops(...)`).
        multiple: the encoder's subsampling factor.
        row_gap: frames between two segments of a row, the encoder's `row_gap`.
        draw_mask: draws a segment's mask; must be picklable unless start_method is 'fork'.
        state: where to begin; None is the beginning.
    Raises:
        UserError: rows that the processes cannot share evenly, crops longer than a row, a state of other data; later,
            naming the recording, whatever is wrong with a file.
    """

    def __init__(
        self,
        dataset: Dataset,
        crops: CropTable,
        settings: LoaderSettings,
        *,
        multiple: int,
        row_gap: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        draw_mask: DrawMask | None = None,
        state: DataState | None = None,
    ) -> None:
        shares = world_size * accumulation
        if settings.rows % shares:
            below = settings.rows // shares * shares
            works = " or ".join(str(rows) for rows in (below, below + shares) if rows)
            raise UserError(
                f"data.rows is {settings.rows}: it must be a multiple of world size {world_size} x accumulation "
                f"{accumulation} = {shares}; nearest: {works}"
            )
        self.dataset, self.crops, self.settings = dataset, crops, settings
        self.rank, self.accumulation = rank, accumulation
        self.batch_rows = settings.rows // shares
        self.stream = RowStream(
            crops,
            row_frames=settings.row_frames,
            row_gap=row_gap,
            multiple=multiple,
            max_segments=settings.max_segments,
            block_crops=settings.block_crops,
            fingerprint=dataset.fingerprint,
        )
        self.state = self.stream.start(state)
        self.draw_mask = draw_mask
        self.quarantined: dict[str, str] = {}  # recordings that this process could not read: what is wrong with them
        if settings.num_workers:
            self._check_shared_memory()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self.updates()

    def updates(self) -> Generator[list[Batch], None, None]:
        """Updates from `self.state` on, which moves along: a second loop goes on where the first one stopped."""
        batches = self._batches()
        try:
            while True:
                update = [next(batches) for _ in range(self.accumulation)]
                self.state = update[-1].state
                yield update
        finally:
            batches.close()

    def plans(self) -> Iterator[Plan]:
        """This rank's batches from `self.state` on, before anything is read."""
        share = self.accumulation * self.batch_rows
        for rows, state in self.stream.updates(self.state, self.settings.rows):
            mine = rows[self.rank * share : (self.rank + 1) * share]
            for first in range(0, share, self.batch_rows):
                yield Plan(mine[first : first + self.batch_rows], state)

    def _batches(self) -> Generator[Batch, None, None]:
        s = self.settings
        shape = (self.batch_rows, s.row_frames, self.dataset.features.num_mels)
        shared = SharedRows(self._slots(), shape)
        reader = RowReader(
            self.dataset,
            self.crops,
            shape,
            s.max_segments,
            self.draw_mask,
            s.normalisation,
            s.verify_checksums,
            shared.buffers,
        )
        pending: deque[tuple[Plan, int | None]] = deque()

        def jobs() -> Iterator[Job]:
            for plan in self.plans():
                slot = shared.take()
                pending.append((plan, slot))
                yield Job.of(plan.rows, slot)

        for reading in self._readings(reader, jobs()):
            if isinstance(reading, UserError):
                raise reading
            plan, slot = pending.popleft()
            self._quarantine(reading.bad)
            log_mel = reading.log_mel if slot is None else shared.tensor(slot)
            assert log_mel is not None
            start, length, seed = torch.from_numpy(reading.segments)
            segments = Segments(start, length, log_mel.shape[1], seed)
            mask = None if reading.mask is None else _unpacked(reading.mask, log_mel.shape[:2])
            text = [[self.crops.text(item) for *_, item in row] for row in reading.crops]
            yield Batch(log_mel, segments, mask, text, reading.crops, plan.state, self.dataset)

    def _readings(self, reader: RowReader, jobs: Iterator[Job]) -> Iterator[Reading | UserError]:
        """Answers in the order of the jobs."""
        s = self.settings
        if s.num_workers == 0:
            return map(reader.__getitem__, jobs)
        workers: DataLoader[Any] = DataLoader(
            reader,  # type: ignore[arg-type]
            sampler=jobs,
            batch_size=None,
            num_workers=s.num_workers,
            prefetch_factor=s.prefetch,
            collate_fn=_as_is,
            worker_init_fn=_begin_worker,
            multiprocessing_context=multiprocessing.get_context(s.start_method),
            generator=torch.Generator(),  # or it would draw from, and so move, the global one
        )
        return iter(workers)

    def _quarantine(self, bad: dict[str, str]) -> None:
        """Note recordings that could not be read. Raises UserError when there are more than may be."""
        for id, reason in bad.items():
            if id not in self.quarantined:
                logging.getLogger(__name__).warning("left out, others in its place: %s", reason)
            self.quarantined[id] = reason
        most = self.settings.max_quarantined
        if len(self.quarantined) > most:
            first = next(iter(self.quarantined.values()))
            raise UserError(
                f"{len(self.quarantined)} recordings cannot be read, data.max_quarantined is {most}; the first: {first}"
            )

    def _slots(self) -> int:
        """Shared buffers: one for every batch under way, and for those of two updates in the hands of the script."""
        s = self.settings
        return s.num_workers * s.prefetch + 2 * self.accumulation if s.num_workers else 0

    def _check_shared_memory(self) -> None:
        folder, s = Path("/dev/shm"), self.settings
        if not folder.is_dir():
            return
        batch = 4 * self.batch_rows * s.row_frames * self.dataset.features.num_mels
        need, free = self._slots() * batch, shutil.disk_usage(folder).free
        if need > free:
            raise UserError(
                f"data.num_workers {s.num_workers} x prefetch {s.prefetch} needs {need >> 20} MiB of shared "
                f"memory, /dev/shm has {free >> 20}: lower them, or enlarge it (docker run --shm-size)"
            )


def _unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """bool [R, F] of what np.packbits made of it."""
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).reshape(shape).view(np.bool_))


def _begin_worker(_: int) -> None:
    """Signals are for the training process: it decides when to stop, and then ends its workers itself.

    A cluster sends SIGTERM to every process of a job; a worker that obeyed it would break the training process's last
    updates. Only a SIGTERM that comes from the training process counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    parent = multiprocessing.parent_process()

    assert parent is not None

    def obey_parent() -> None:
        while parent.is_alive():
            sent = signal.sigtimedwait([signal.SIGTERM], 1.0)
            if sent is not None and sent.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()


def _as_is(reading: Any) -> Any:
    return reading
