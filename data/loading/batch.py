"""What the model is given, and how it is read: frames to normalised rows, with masks and seeds beside them."""

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
"""(generator of the segment, its frames) -> bool [frames], True where the input is to be hidden."""


Crop = tuple[int, int, int, int]
"""(recording, first frame, frame after the last, row of the crop table)"""


@dataclass
class Batch:
    """One process's rows of one accumulation step. Letters: R rows, F frames, M bins, S segment slots."""

    log_mel: Tensor
    """float32 [R, F, M], normalised; zero outside segments."""
    segments: Segments
    """In mel frames; seeds are a pure function of (seed, epoch, crop)."""
    mask: Tensor | None
    """bool [R, F], as the loader's callable drew it; None where it has none."""
    text: list[list[str]]
    """Transcript of every used segment of every row, "" where there is none."""
    crops: list[list[Crop]]
    """Of every used segment of every row."""
    state: DataState
    """Where the next update begins: what a checkpoint stores."""
    dataset: Dataset
    """Where the recordings are."""

    @property
    def ids(self) -> list[list[str]]:
        """'recording:start-stop' (frames) of every used segment. Looked up only here: few are ever asked for."""
        return [[f"{self.dataset.id(crop[0])}:{crop[1]}-{crop[2]}" for crop in row] for row in self.crops]


@dataclass(frozen=True)
class Job:
    """What a worker is asked for: the crops of every row, and the shared buffer to place them in (None: a new one)."""

    crops: np.ndarray
    """int64 [8, n], row after row: row, slot, first frame in the row; recording, start, stop, seed, item of the crop.
    One array, because unpickling six small ones a row would take a tenth of a worker's time."""
    slot: int | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], slot: int | None = None) -> Job:
        sizes = [len(row.begin) for row in rows]
        places = np.repeat(np.arange(len(rows)), sizes), np.concatenate([np.arange(size) for size in sizes])
        of_rows = [[row.begin, *(getattr(row.crops, field.name) for field in fields(Crops))] for row in rows]
        return cls(np.stack([*places, *map(np.concatenate, zip(*of_rows, strict=True))]), slot)


@dataclass(frozen=True)
class Reading:
    """A worker's answer: a Batch's arrays; log_mel is None where it lies in the job's buffer."""

    log_mel: Tensor | None
    segments: np.ndarray
    """int64 [3, R, S]: start, length and seed."""
    mask: np.ndarray | None
    """uint8: bool [R, F], eight values a byte, since it goes through a pipe."""
    crops: list[list[Crop]]
    """Of every used segment."""
    bad: dict[str, str]
    """Recordings that could not be read, others were taken instead: what is wrong with each."""


class SharedRows:
    """Buffers for log_mel in shared memory, float32 [R, F, M], used again and again.

    The pages of new shared memory cost more than everything else that a worker does. A buffer is free again when
    nothing refers to the tensor that was made of it, so a batch that is kept stays as it is.
    """

    def __init__(self, slots: int, shape: tuple[int, int, int]) -> None:
        self.buffers = [_new_shared(shape) for _ in range(slots)]
        self._free = deque(range(slots))

    def take(self) -> int | None:
        """A free buffer's number, None where all are in use."""
        return self._free.popleft() if self._free else None

    def tensor(self, slot: int) -> Tensor:
        """The buffer as a tensor; its slot is given back when the tensor and all its views are gone."""
        view = self.buffers[slot].numpy().view()
        weakref.finalize(view, self._free.append, slot).atexit = False
        return torch.from_numpy(view)


SUBSTITUTES = 16


class RowReader:
    """`reader[job]` reads, normalises and places the rows of a job. Runs in workers.

    A crop that cannot be read, even at a second attempt, is replaced by one that its seed determines, so any process
    replaces it alike; where SUBSTITUTES of them do not fit or cannot be read either, its place stays empty. A storage
    that answers for neither of two crops, each tried as often as its settings say, is no matter of a recording: then
    the answer is a UserError.

    Args:
        crops: the order, where substitutes come from.
        shape: (R, F, M) of a batch.
        max_segments: S.
        draw_mask: draws a segment's mask.
        buffers: tensors [R, F, M] in shared memory that jobs may name.
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
    ) -> None:
        self.dataset, self.crops = dataset, crops
        self.shape, self.max_segments, self.draw_mask = shape, max_segments, draw_mask
        self.normalisation, self.verify_checksums, self.buffers = normalisation, verify_checksums, buffers
        self._scratch = np.empty(shape[1:], np.float16)

    def __getitem__(self, job: Job) -> Reading | UserError:
        try:
            if job.slot is not None:
                return self._fill(self.buffers[job.slot], job, keep=False)
            log_mel = torch.empty(self.shape) if get_worker_info() is None else _new_shared(self.shape)
            return self._fill(log_mel, job, keep=True)
        except UserError as error:
            return error  # raised in the main process, without a worker's traceback around it

    def _fill(self, log_mel: Tensor, job: Job, keep: bool) -> Reading:
        # Slices of a numpy array: torch takes ten times as long for one.
        values = log_mel.numpy()
        mask = None if self.draw_mask is None else np.zeros(self.shape[:2], bool)
        segments = np.zeros((3, len(values), self.max_segments), np.int64)
        crops_of_rows: list[list[Crop]] = [[] for _ in values]
        filled = [0] * len(values)
        bad: dict[str, str] = {}
        for row, slot, begin, recording, start, stop, seed, item in zip(*job.crops.tolist(), strict=True):
            values[row, filled[row] : begin] = 0
            filled[row] = begin
            found = self._place(values[row, begin : begin + stop - start], (recording, start, stop, item), seed, bad)
            if found is None:
                continue
            frames = found[2] - found[1]
            filled[row] = end = begin + frames
            segments[:, row, slot] = begin, frames, seed
            if mask is not None and self.draw_mask is not None:
                mask[row, begin:end] = self.draw_mask(np.random.Generator(np.random.PCG64(seed)), frames)
            crops_of_rows[row].append(found)
        for row, end in enumerate(filled):
            values[row, end:] = 0
        packed = None if mask is None else np.packbits(mask)
        return Reading(log_mel if keep else None, segments, packed, crops_of_rows, bad)

    def _place(self, out: np.ndarray, crop: Crop, seed: int, bad: dict[str, str]) -> Crop | None:
        """Read the crop, or a substitute, into the front of `out` [frames, M]; which one it was, None for neither."""
        substitutes = (self.crops.substitute(seed, len(out), attempt) for attempt in range(SUBSTITUTES))
        unanswered = 0
        for candidate in itertools.chain([crop], substitutes):
            if candidate is not None:
                recording, start, stop, _ = candidate
                try:
                    self._read(out[: stop - start], recording, start, stop)
                    return candidate
                except UserError as error:
                    unanswered += isinstance(error.__cause__, StorageError)
                    if unanswered == 2:
                        raise UserError(f"the storage does not answer: {error}") from error
                    bad[self.dataset.id(recording)] = str(error)
        return None

    def _read(self, out: np.ndarray, recording: int, start: int, stop: int) -> None:
        try:
            self._read_once(out, recording, start, stop)
        except UserError as error:
            if isinstance(error.__cause__, StorageError):
                raise  # it was tried as often as it may be
            self.dataset.forget(recording, start, stop)  # what a cache holds may be what is damaged
            self._read_once(out, recording, start, stop)

    def _read_once(self, out: np.ndarray, recording: int, start: int, stop: int) -> None:
        if self.verify_checksums:
            values = self.dataset.read(recording, start, stop, verify=True)
        else:
            values = self._scratch[: stop - start]
            self.dataset.read_into(recording, start, values)
        self.dataset.normalise_into(torch.from_numpy(out), values, recording, self.normalisation)


def _new_shared(shape: tuple[int, int, int]) -> Tensor:
    """float32 in shared memory; torch has no public way to make such a tensor without copying one."""
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
    return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
