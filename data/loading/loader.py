"""Data loader: optimizer steps of packed rows, identical for any world size and number of workers.

The main process plans batches (integers only); workers read, normalise and place the frames. A plan determines its
batch completely, so the assignment of batches to workers has no effect.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from common.errors import UserError
from common.segments import Segments
from data.format.dataset import Dataset, Normalisation, open_dataset
from data.loading.batch import Batch, BatchContent, BatchPlan, DrawMask, Mix, RowReader, SharedBuffers
from data.loading.order import CropOrder, CropTable
from data.loading.rows import DataState, Row, RowStream
from data.storage.local import StorageSettings

# Fields that may change when a run is resumed: they do not affect the stream of rows.
FREE_LOADER_FIELDS = ("num_workers", "prefetch", "start_method", "storage", "verify_checksums", "max_quarantined")

# Locations of the data, which may change when a run is resumed if the fingerprint of the data stays the same.
LOADER_PLACES = ("dataset", "mixture[].dataset")


@dataclass(frozen=True)
class MixturePart:
    """Dataset of a mixture."""

    dataset: str = ""
    """Folder or URL of the dataset."""
    weight: NonNegativeFloat = 0.0
    """Share of the training audio relative to the weights of the other parts; 0 in all parts: proportional to hours."""
    pseudo_labels: bool = False
    """The transcripts are those of tools/pseudo_label.py: finetune.label_minutes does not limit them."""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise UserError("data.mixture has a part without a dataset: give its folder or URL")
        if not 0 <= self.weight < float("inf"):  # infinity and NaN pass the type
            raise UserError(f"data.mixture: the weight of {self.dataset} is {self.weight}: give a number, 0 or more")


@dataclass(frozen=True)
class LoaderSettings:
    """Recordings, order, packing and reading of batches."""

    dataset: str = ""
    """Dataset written by `python -m data.prepare`: a folder, or a URL of object storage (s3://, https://)."""
    mixture: list[MixturePart] = field(default_factory=list)
    """Several weighted datasets in place of `dataset`."""
    language_temperature: ClosedUnitInterval = 1.0
    """Exponent of the hours in the share of a language. 1: proportional to the hours, 0: equal shares."""
    storage: StorageSettings = field(default_factory=StorageSettings)
    """Retries and cache of remote datasets."""
    split: str = "train"
    """Split to read."""
    row_frames: PositiveInt = 2000
    """Mel frames per row (100 per second by default); a multiple of the encoder's `row_multiple`."""
    rows: PositiveInt = 16
    """Rows per optimizer step, summed over processes and accumulation steps."""
    max_segments: PositiveInt = 16
    """Maximum number of segments per row."""
    block_crops: PositiveInt = 1024
    """Crops packed together: larger blocks fill rows better, smaller ones need less memory."""
    min_seconds: float = 1.0
    """Minimum length: shorter recordings and crops are skipped."""
    max_seconds: float = 20.0
    """Maximum length of a crop: longer recordings are cut."""
    num_workers: NonNegativeInt = 2
    """Worker processes per training process; 0 reads in the training process."""
    prefetch: PositiveInt = 2
    """Batches that every worker prefetches."""
    normalisation: Normalisation = "recording"
    """Zero mean and unit variance of every mel bin, over the 'recording' or the 'dataset'."""
    seed: int = 0
    """Seed of order, cuts, masks and noise."""
    verify_checksums: bool = False
    """Verify the checksum of every block read."""
    max_quarantined: NonNegativeInt = 16
    """Maximum number of unreadable recordings per process, which are replaced; more are an error."""
    start_method: Literal["fork", "forkserver", "spawn"] = "fork"
    """Start method of workers. 'fork' is the fastest; use another if a library does not support forking."""

    def __post_init__(self) -> None:
        if not 0 < self.min_seconds <= self.max_seconds:
            raise UserError(
                f"data.min_seconds is {self.min_seconds} and data.max_seconds {self.max_seconds}: "
                "0 < min_seconds <= max_seconds is required"
            )

    def crop_frames(self, dataset: Dataset) -> tuple[int, int]:
        """(max_frames, min_frames) of a crop at the frame rate of this dataset."""
        rate = dataset.features.frames_per_second
        return min(self.row_frames, int(self.max_seconds * rate)), max(1, round(self.min_seconds * rate))

    def open(self) -> Dataset:
        """Open the dataset, or the datasets of the mixture as one. Raises UserError like `open_dataset`."""
        if bool(self.dataset) == bool(self.mixture):
            raise UserError(
                f"data.dataset is {self.dataset!r} and data.mixture has {len(self.mixture)} parts: give one of them"
            )
        if self.dataset:
            return open_dataset(self.dataset, storage=self.storage)
        from data.loading.mixture import DatasetGroup  # imported only for a mixture

        datasets = [open_dataset(part.dataset, storage=self.storage) for part in self.mixture]
        return DatasetGroup(datasets, [part.weight for part in self.mixture])

    def crop_order(self, dataset: Dataset, recordings: np.ndarray | None = None) -> CropTable:
        """Order of self-supervised training over some recordings, by default those of the split."""
        lengths = self.crop_frames(dataset)
        if recordings is None:
            recordings = dataset.select(split=self.split)
        return self.mixed_order(dataset, recordings, lambda r, seed: CropOrder(dataset.frames, *lengths, seed, r))

    def mixed_order(
        self, dataset: Dataset, recordings: np.ndarray, make: Callable[[np.ndarray, int], CropTable]
    ) -> CropTable:
        """Order of the recordings with the shares of the settings; `make(recordings, seed)` is the order of a group."""
        if not self.mixture and self.language_temperature == 1:
            return make(recordings, self.seed)
        from data.loading.mixture import groups, mixed

        return mixed(groups(dataset, recordings, self.language_temperature), self.seed, make)


@dataclass(frozen=True)
class CurriculumStage:
    """Later stage of training with rows and crops of another length."""

    after_step: int = 0
    """last step of the previous stage; 1 or more, and increasing from stage to stage"""
    row_frames: int = 2000
    """frames per row, instead of data.row_frames; the number of rows changes so that frames per step stay constant"""
    max_seconds: float = 20.0
    """longest crop, instead of data.max_seconds"""
    rotary_interpolation: PositiveFloat | None = None
    """encoder.rotary_interpolation of this stage: 4 keeps segments of 16 s within the angles of 4 s (Chen et al.,
    Extending Context Window of LLMs via Positional Interpolation, arXiv 2306.15595); null for that of the stage before
    """


class RowLoader:
    """Endless iterator over optimizer steps; each is a list of `accumulation` batches with this rank's rows.

    The rows of a step are the same for any world size, accumulation and number of workers: rank r reads the r-th
    contiguous share, in the order of its accumulation steps.

    Args:
        dataset: the opened dataset.
        crops: the order (`settings.crop_order(dataset)` or `supervised_crops(...)`).
        multiple: the encoder's `row_multiple`.
        row_gap: minimum number of frames between two segments of a row, the encoder's `row_gap`.
        draw_mask: draws the mask of a segment; must be picklable unless start_method is 'fork'.
        mix: adds other sounds to segments, as `Batch.received`; picklable too.
        state: initial position; None is the start of the stream.

    Raises:
        UserError: rows that are not divisible among the processes, crops longer than a row, a state that belongs to
            other data; during iteration, too many unreadable recordings.
    """

    stage = 0  # of the curriculum: see pipelines/curriculum.py

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
        mix: Mix | None = None,
        state: DataState | None = None,
    ) -> None:
        shares = world_size * accumulation
        if settings.rows % shares:
            below = settings.rows // shares * shares
            nearest = " or ".join(str(rows) for rows in (below, below + shares) if rows)
            raise UserError(
                f"data.rows is {settings.rows}: it must be a multiple of world size {world_size} x accumulation "
                f"{accumulation} = {shares}; nearest: {nearest}"
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
        self.draw_mask, self.mix = draw_mask, mix
        self.quarantined: dict[str, str] = {}  # id of every recording unreadable in this process -> error message
        if settings.num_workers:
            from data.loading.workers import check_shared_memory  # a reader of the loop need not read it

            batch = 4 * self.batch_rows * settings.row_frames * dataset.features.num_mels
            check_shared_memory(self._num_buffers() * batch, f"{settings.num_workers} x prefetch {settings.prefetch}")

    def __iter__(self) -> Iterator[list[Batch]]:
        return self.steps()

    def steps(self, interrupted: Callable[[], bool] | None = None) -> Generator[list[Batch], None, None]:
        """Yield the steps from `self.state` on and advance it: a second call continues after the last step.

        Args:
            interrupted: called every few seconds while workers have no batch ready; True ends the iteration.
        """
        batches = self._batches(interrupted)
        try:
            while len(micro_batches := list(islice(batches, self.accumulation))) == self.accumulation:
                self.state = micro_batches[-1].state
                yield micro_batches
        finally:
            batches.close()

    def batch_rows_and_states(self) -> Iterator[tuple[list[Row], DataState]]:
        """Rows of this rank's batches from `self.state` on, and the state after their step, without reading frames."""
        share = self.accumulation * self.batch_rows
        for rows, state in self.stream.steps(self.state, self.settings.rows):
            rank_rows = rows[self.rank * share : (self.rank + 1) * share]
            for first in range(0, share, self.batch_rows):
                yield rank_rows[first : first + self.batch_rows], state

    def _batches(self, interrupted: Callable[[], bool] | None) -> Generator[Batch, None, None]:
        s = self.settings
        shape = (self.batch_rows, s.row_frames, self.dataset.features.num_mels)
        pool: type[SharedBuffers] = SharedBuffers
        if torch.cuda.is_initialized():
            from data.loading.pinned import PinnedBuffers as pool  # imported only for a GPU
        shared = pool(self._num_buffers(), shape)
        reader = RowReader(
            self.dataset,
            self.crops,
            shape,
            s.max_segments,
            self.draw_mask,
            s.normalisation,
            s.verify_checksums,
            shared.buffers,
            self.mix,
        )
        pending: deque[tuple[DataState, int | None]] = deque()

        def plans() -> Iterator[BatchPlan]:
            for rows, state in self.batch_rows_and_states():
                buffer = shared.take()
                pending.append((state, buffer))
                yield BatchPlan.from_rows(rows, buffer)

        contents: Iterator[BatchContent | UserError] = map(reader.__getitem__, plans())
        if s.num_workers:
            from data.loading.workers import read_in_workers  # a reader of the loop need not read it

            workers = {"num_workers": s.num_workers, "prefetch": s.prefetch, "start_method": s.start_method}
            contents = read_in_workers(reader, plans(), **workers, interrupted=interrupted)
        for content in contents:
            if isinstance(content, UserError):
                raise content
            state, buffer = pending.popleft()
            self._quarantine(content.unreadable)
            log_mel = content.log_mel if buffer is None else shared.tensor(buffer)
            assert log_mel is not None
            start, length, seed = torch.from_numpy(content.segments)
            segments = Segments(start, length, log_mel.shape[1], seed)
            mask = None if content.mask is None else _unpack_mask(content.mask, log_mel.shape[:2])
            text = [[self.crops.text(item) for *_, item in row] for row in content.crops]
            yield Batch(log_mel, segments, mask, text, content.crops, state, self.dataset, content.received)

    def _quarantine(self, unreadable: dict[str, str]) -> None:
        """Record unreadable recordings. Raises UserError if there are more than `max_quarantined`."""
        for id, reason in unreadable.items():
            if id not in self.quarantined:
                logging.getLogger(__name__).warning("replaced by another crop: %s", reason)
            self.quarantined[id] = reason
        limit = self.settings.max_quarantined
        if len(self.quarantined) > limit:
            first = next(iter(self.quarantined.values()))
            raise UserError(
                f"{len(self.quarantined)} recordings cannot be read, data.max_quarantined is {limit}; first: {first}"
            )

    def _num_buffers(self) -> int:
        """Buffers for all prefetched batches and for the batches of three steps that script and GPU may hold."""
        s = self.settings
        return s.num_workers * s.prefetch + 3 * self.accumulation if s.num_workers else 0


def _unpack_mask(bits: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Inverse of np.packbits, bool of the given shape."""
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).reshape(shape).view(np.bool_))
