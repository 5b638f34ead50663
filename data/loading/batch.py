"""Batches of packed rows, and the reader that fills them with normalised frames in worker processes."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from common.errors import UserError
from common.segments import Segments
from data.format.dataset import Dataset, Normalisation
from data.loading.order import Crops, CropTable
from data.loading.rows import DataState, Row
from data.storage.local import StorageError

DrawMask = Callable[[np.random.Generator, int], np.ndarray]
"""(generator of the segment, number of frames) -> bool [frames], True for masked frames"""

Mix = Callable[[np.ndarray, int, int], np.ndarray | None]
"""(normalised segment [frames, M], recording, seed) -> what a model receives in its place; None: the segment itself"""

Crop = tuple[int, int, int, int]
"""(recording, first frame, frame after the last, row of the crop table)"""

SUBSTITUTES = 16
"""maximum number of replacements tried for an unreadable crop"""


@dataclass
class Batch:
    """Rows of one process for one accumulation step: R rows, F mel frames, M mel bins, S segment slots."""

    log_mel: Tensor
    """float32 [R, F, M], normalised; zero outside segments"""
    segments: Segments
    """in mel frames; the seeds are a pure function of (seed, epoch, crop)"""
    mask: Tensor | None
    """bool [R, F], drawn by the loader's `draw_mask`; None without one"""
    text: list[list[str]]
    """transcript of every used segment of every row, "" if there is none"""
    crops: list[list[Crop]]
    """crop of every used segment of every row"""
    state: DataState
    """position of the next optimizer step, for checkpoints"""
    dataset: Dataset
    """source of the recordings"""
    received: Tensor | None = None
    """float32 [R, F, M], log_mel with other sounds added by the loader's `mix`; None without it"""

    @property
    def ids(self) -> list[list[str]]:
        """'recording:start-stop' (frames) of every used segment of every row."""
        return [[f"{self.dataset.id(crop[0])}:{crop[1]}-{crop[2]}" for crop in row] for row in self.crops]


@dataclass(frozen=True)
class BatchPlan:
    """Request to a worker: the crops of a batch and their positions."""

    crops: np.ndarray
    """int64 [8, n], by row, then slot: row, slot, first frame within the row; recording, start, stop, seed and item of
    the crop. One array, because unpickling six small ones per row would take a tenth of a worker's time."""
    buffer: int | None = None
    """index of the shared buffer for log_mel; None for a new tensor"""

    @classmethod
    def from_rows(cls, rows: Sequence[Row], buffer: int | None = None) -> BatchPlan:
        """Plan of a batch with these rows."""
        sizes = [len(row.first_frame) for row in rows]
        positions = np.repeat(np.arange(len(rows)), sizes), np.concatenate([np.arange(size) for size in sizes])
        columns = [[row.first_frame, *(getattr(row.crops, field.name) for field in fields(Crops))] for row in rows]
        return cls(np.stack([*positions, *map(np.concatenate, zip(*columns, strict=True))]), buffer)


@dataclass(frozen=True)
class BatchContent:
    """Response of a worker: the arrays of a batch."""

    log_mel: Tensor | None
    """float32 [R, F, M]; None if it is in the shared buffer"""
    segments: np.ndarray
    """int64 [3, R, S]: start, length and seed"""
    mask: np.ndarray | None
    """uint8, bool [R, F] packed into bits, to send fewer bytes through the pipe"""
    crops: list[list[Crop]]
    """crop of every used segment of every row"""
    unreadable: dict[str, str]
    """id of every recording that could not be read and was replaced -> error message"""
    received: Tensor | None = None
    """float32 [R, F, M], see `Batch`"""


class SharedBuffers:
    """Pool of buffers for log_mel in shared memory, float32 [R, F, M] each.

    They are reused because allocating pages of shared memory costs more than all other work of a worker. A buffer
    returns to the pool when the last tensor that refers to it is deleted, so a batch that is kept is never overwritten.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        self.buffers = [_shared_tensor(shape) for _ in range(count)]
        self._free = deque(range(count))

    def take(self) -> int | None:
        """Index of a free buffer, or None if all are in use."""
        return self._free.popleft() if self._free else None

    def tensor(self, buffer: int) -> Tensor:
        """Tensor over a buffer, which is freed with the tensor and all its views."""
        view = self.buffers[buffer].numpy().view()
        weakref.finalize(view, lambda: self._free.append(buffer)).atexit = False  # keeps the pool as long as the view
        return torch.from_numpy(view)


class RowReader:
    """Dataset of batches for workers: `reader[plan]` reads, normalises and places the crops of a plan.

    A crop that fails twice is replaced by another, which its seed determines, so all processes choose the same one. Its
    slot stays empty if SUBSTITUTES replacements do not fit or fail as well. If the storage fails for two crops, after
    the retries of its settings, the result is a UserError, because the recordings are not the cause.

    Args:
        crops: the order, as the source of replacements.
        shape: (R, F, M) of a batch.
        max_segments: S.
        draw_mask: draws the mask of a segment.
        buffers: tensors [R, F, M] in shared memory, indexed by plans.
        mix: adds other sounds to segments; None leaves `received` out.
    """

    def __init__(
        self,
        dataset: Dataset,
        crops: CropTable,
        shape: tuple[int, int, int],
        max_segments: int,
        draw_mask: DrawMask | None,
        normalisation: Normalisation = "recording",
        verify_checksums: bool = False,
        buffers: Sequence[Tensor] = (),
        mix: Mix | None = None,
    ) -> None:
        self.dataset, self.crops = dataset, crops
        self.shape, self.max_segments, self.draw_mask = shape, max_segments, draw_mask
        self.normalisation, self.verify_checksums, self.buffers = normalisation, verify_checksums, buffers
        self.mix = mix
        self._stored = np.empty(shape[1:], np.float16)
        self._original = np.empty(shape[1:], np.float32) if crops.augments else None

    def __getitem__(self, plan: BatchPlan) -> BatchContent | UserError:
        try:
            if plan.buffer is not None:
                return self._fill(self.buffers[plan.buffer], plan, keep=False)
            return self._fill(self._new_tensor(), plan, keep=True)
        except UserError as error:
            return error  # raised in the main process, without the traceback of a worker

    def _new_tensor(self) -> Tensor:
        if get_worker_info() is not None:
            return _shared_tensor(self.shape)
        return torch.empty(self.shape, pin_memory=torch.cuda.is_initialized())

    def _fill(self, log_mel: Tensor, plan: BatchPlan, keep: bool) -> BatchContent:
        # numpy, because slicing a tensor takes ten times as long.
        values = log_mel.numpy()
        mask = None if self.draw_mask is None else np.zeros(self.shape[:2], bool)
        segments = np.zeros((3, len(values), self.max_segments), np.int64)
        row_crops: list[list[Crop]] = [[] for _ in values]
        filled = [0] * len(values)
        unreadable: dict[str, str] = {}
        mixed: list[tuple[int, int, np.ndarray]] = []
        lengths = self.crops.lengths(Crops(*plan.crops[3:])).tolist()
        for row, slot, first_frame, *wanted, seed, item, length in zip(*plan.crops.tolist(), lengths, strict=True):
            values[row, filled[row] : first_frame] = 0
            filled[row] = first_frame
            out = values[row, first_frame : first_frame + length]
            first_choice = (*wanted, item)
            crop = self._read_or_replace(out, first_choice, seed, unreadable)
            if crop is None:
                continue
            num_frames = length if crop is first_choice else crop[2] - crop[1]
            filled[row] = end = first_frame + num_frames
            segments[:, row, slot] = first_frame, num_frames, seed
            if mask is not None and self.draw_mask is not None:
                generator = np.random.Generator(np.random.PCG64(seed))
                mask[row, first_frame:end] = self.draw_mask(generator, num_frames)
            row_crops[row].append(crop)
            if self.mix is not None and (sounds := self.mix(values[row, first_frame:end], crop[0], seed)) is not None:
                mixed.append((row, first_frame, sounds))
        for row, end in enumerate(filled):
            values[row, end:] = 0
        bits = None if mask is None else np.packbits(mask)
        received = None if self.mix is None else self._new_tensor().copy_(log_mel)
        for row, first_frame, sounds in mixed:
            received.numpy()[row, first_frame : first_frame + len(sounds)] = sounds  # type: ignore[union-attr]
        return BatchContent(log_mel if keep else None, segments, bits, row_crops, unreadable, received)

    def _read_or_replace(self, out: np.ndarray, crop: Crop, seed: int, unreadable: dict[str, str]) -> Crop | None:
        """Read the crop, or else a replacement, into `out` [frames, M]; return the crop read, or None.

        A replacement is not augmented.
        """
        substitutes = (self.crops.substitute(seed, len(out), attempt) for attempt in range(SUBSTITUTES))
        storage_failures = 0
        for candidate in itertools.chain([crop], substitutes):
            if candidate is not None:
                recording, start, stop, _ = candidate
                try:
                    if candidate is crop and self._original is not None:
                        self._read(self._original[: stop - start], recording, start, stop)
                        self.crops.augment(self._original[: stop - start], seed, out)
                    else:
                        self._read(out[: stop - start], recording, start, stop)
                    return candidate
                except UserError as error:
                    storage_failures += isinstance(error.__cause__, StorageError)
                    if storage_failures == 2:
                        raise UserError(f"the storage does not respond: {error}") from error
                    unreadable[self.dataset.id(recording)] = str(error)
        return None

    def _read(self, out: np.ndarray, recording: int, start: int, stop: int) -> None:
        try:
            self._read_once(out, recording, start, stop)
        except UserError as error:
            if isinstance(error.__cause__, StorageError):
                raise  # the storage has retried already
            self.dataset.forget(recording, start, stop)  # the cached copy may be damaged
            self._read_once(out, recording, start, stop)

    def _read_once(self, out: np.ndarray, recording: int, start: int, stop: int) -> None:
        if self.verify_checksums:
            values = self.dataset.read(recording, start, stop, verify=True)
        else:
            values = self._stored[: stop - start]
            self.dataset.read_into(recording, start, values)
        self.dataset.normalise_into(torch.from_numpy(out), values, recording, self.normalisation)


def _shared_tensor(shape: tuple[int, int, int]) -> Tensor:
    """Uninitialised float32 tensor in shared memory; torch's public functions would copy an existing tensor."""
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
    return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
