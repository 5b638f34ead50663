"""What the model is given, and how it is read: frames to normalised rows, with masks and seeds beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data.errors import DataError
from data.rows import DataState, Row
from data.shards import Dataset, Normalisation

DrawMask = Callable[[np.random.Generator, int], np.ndarray]
"""(generator of the segment, its frames) -> bool [frames], True where the input is to be hidden."""


@dataclass
class Batch:
    """One process's rows of one accumulation step. Letters: R rows, F frames, M bins, S segment slots."""

    log_mel: Tensor
    """float32 [R, F, M], normalised; zero outside segments."""
    segment_start: Tensor
    """int64 [R, S], first frame of every segment, multiples of the subsampling factor; 0 in unused slots."""
    segment_length: Tensor
    """int64 [R, S], frames; 0 marks an unused slot."""
    segment_seed: Tensor
    """int64 [R, S], a pure function of (seed, epoch, crop)."""
    mask: Tensor | None
    """bool [R, F], as the loader's callable drew it; None where it has none."""
    text: list[list[str]]
    """Transcript of every used segment of every row, "" where there is none."""
    ids: list[list[str]]
    """'recording:start-stop' (frames) of every used segment."""
    state: DataState
    """Where the next update begins: what a checkpoint stores."""

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        names = ("log_mel", "segment_start", "segment_length", "segment_seed", "mask")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{n: t.to(device, non_blocking=True) for n, t in tensors.items() if t is not None})


@dataclass(frozen=True)
class Plan:
    """A batch before it is read."""

    rows: list[Row]
    text: list[list[str]]
    state: DataState


@dataclass(frozen=True)
class RowReader:
    """`reader[plan]` is the Batch of a plan, or the error that reading it met. Runs in workers."""

    dataset: Dataset
    draw_mask: DrawMask | None
    row_frames: int
    max_segments: int
    normalisation: Normalisation
    verify_checksums: bool

    def __getitem__(self, plan: Plan) -> Batch | DataError:
        try:
            return self.read(plan)
        except DataError as error:
            return error  # raised in the main process, without a worker's traceback around it

    def read(self, plan: Plan) -> Batch:
        log_mel = _zeros(len(plan.rows), self.row_frames, self.dataset.features.num_mels)
        mask = None if self.draw_mask is None else torch.zeros(log_mel.shape[:2], dtype=torch.bool)
        start, length, seed = torch.zeros(3, len(plan.rows), self.max_segments, dtype=torch.int64)
        ids = []
        for number, row in enumerate(plan.rows):
            crops, used = row.crops, len(row.begin)
            start[number, :used] = torch.from_numpy(row.begin)
            length[number, :used] = torch.from_numpy(crops.stop - crops.start)
            seed[number, :used] = torch.from_numpy(crops.seed)
            columns = (row.begin, crops.recording, crops.start, crops.stop, crops.seed)
            segments = list(zip(*(column.tolist() for column in columns), strict=True))
            for begin, recording, first, last, segment_seed in segments:
                frames = last - first
                values = self.dataset.read(recording, first, last, self.verify_checksums)
                out = log_mel[number, begin : begin + frames]
                self.dataset.normalise_into(out, values, recording, self.normalisation)
                if mask is not None and self.draw_mask is not None:
                    generator = np.random.Generator(np.random.PCG64(segment_seed))
                    drawn = self.draw_mask(generator, frames)
                    mask[number, begin : begin + frames] = torch.from_numpy(drawn)
            ids.append([f"{self.dataset.id(r)}:{first}-{last}" for _, r, first, last, _ in segments])
        return Batch(log_mel, start, length, seed, mask, plan.text, ids, plan.state)


def _zeros(*shape: int) -> Tensor:
    """float32 zeros; in a worker in shared memory from the start, which saves a copy on the way to the main process."""
    if get_worker_info() is None:
        return torch.zeros(shape)
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
    return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]
