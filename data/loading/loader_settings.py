"""Which recordings are read, and how they become batches: the settings of the loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from common.errors import UserError
from data.format.dataset import Dataset, Normalisation, open_dataset
from data.loading.mixture import DatasetGroup, MixturePart, groups, mixed
from data.loading.order import CropOrder, CropTable
from data.storage.local import StorageSettings

# What may change between two starts of one run: nothing here alters which crops come when.
FREE_LOADER_FIELDS = ("num_workers", "prefetch", "start_method", "storage", "verify_checksums", "max_quarantined")

# Locations of the data. They may change between two starts of a run if the data's fingerprint does not.
LOADER_PLACES = ("dataset", "mixture[].dataset")


@dataclass(frozen=True)
class LoaderSettings:
    """Which recordings are read, and how they become batches."""

    dataset: str = ""
    """Folder of the dataset, as `python -m data.prepare` makes it, or its URL in object storage (s3://, https://)."""
    mixture: list[MixturePart] = field(default_factory=list)
    """Several datasets instead of one, with their weights."""
    language_temperature: float = 1.0
    """Share of a language: its hours to this power. 1: as they are, 0.5: small languages more often, 0: all alike."""
    storage: StorageSettings = field(default_factory=StorageSettings)
    """Retries, and the cache of remote datasets."""
    split: str = "train"
    """Split of the dataset that is read."""
    row_frames: int = 2000
    """Frames in a row (100 are a second); a multiple of the encoder's subsampling factor."""
    rows: int = 16
    """Rows in an update, over all processes and accumulation steps together."""
    max_segments: int = 16
    """Most utterances that share a row."""
    block_crops: int = 1024
    """Crops that are packed together: more fill rows better, fewer cost less memory."""
    min_seconds: float = 1.0
    """Shorter recordings and pieces are left out."""
    max_seconds: float = 20.0
    """Longer recordings are cut into pieces of at most this length."""
    num_workers: int = 2
    """Processes that read; 0 reads in the training process."""
    prefetch: int = 2
    """Batches that every worker has ready."""
    normalisation: Normalisation = "recording"
    """Zero mean and unit variance of every mel bin over the 'recording' or over the 'dataset'."""
    seed: int = 0
    """Decides the order, the cuts, the masks and the noise."""
    verify_checksums: bool = False
    """Check every block against its checksum when it is read."""
    max_quarantined: int = 16
    """Recordings that a process may find unreadable, after retries, before it is an error; others take their place."""
    start_method: Literal["fork", "forkserver", "spawn"] = "fork"
    """How workers start. 'fork' is quickest; the others where something in the process does not survive a fork."""

    def __post_init__(self) -> None:
        for name, least in (("row_frames", 1), ("rows", 1), ("max_segments", 1), ("block_crops", 1), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}: must be at least {least}")
        if self.max_quarantined < 0:
            raise UserError(f"data.max_quarantined is {self.max_quarantined}: must be 0 (none may be bad) or more")
        if self.num_workers < 0:
            raise UserError(f"data.num_workers is {self.num_workers}: must be 0 (no processes) or more")
        if not 0 <= self.language_temperature <= 1:
            raise UserError(f"data.language_temperature is {self.language_temperature}: must be from 0 to 1")
        if not 0 < self.min_seconds <= self.max_seconds:
            raise UserError(
                f"data.min_seconds is {self.min_seconds} and max_seconds {self.max_seconds}: need 0 < min <= max"
            )
        for name, known in (
            ("normalisation", ("recording", "dataset")),
            ("start_method", ("fork", "forkserver", "spawn")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"data.{name} is {getattr(self, name)!r}: must be one of {known}")

    def crop_frames(self, dataset: Dataset) -> tuple[int, int]:
        """(max_frames, min_frames) of a crop: the settings in seconds, in frames of this dataset."""
        rate = dataset.features.frames_per_second
        return min(self.row_frames, int(self.max_seconds * rate)), max(1, round(self.min_seconds * rate))

    def open(self) -> Dataset:
        """The dataset, or the datasets of the mixture as one. Raises UserError as `open_dataset`."""
        if bool(self.dataset) == bool(self.mixture):
            raise UserError(
                f"data.dataset is {self.dataset!r} and data.mixture has {len(self.mixture)} parts: give one of them"
            )
        if self.dataset:
            return open_dataset(self.dataset, storage=self.storage)
        datasets = [open_dataset(part.dataset, storage=self.storage) for part in self.mixture]
        return DatasetGroup(datasets, [part.weight for part in self.mixture])

    def crop_order(self, dataset: Dataset) -> CropTable:
        """The order of self-supervised training over the split."""
        lengths = self.crop_frames(dataset)
        return self.mixed_order(
            dataset,
            dataset.select(split=self.split),
            lambda recordings, seed: CropOrder(dataset.frames, *lengths, seed, recordings),
        )

    def mixed_order(
        self, dataset: Dataset, recordings: np.ndarray, make: Callable[[np.ndarray, int], CropTable]
    ) -> CropTable:
        """The recordings in the shares that the settings give them. make: (recordings, seed) -> order of one group."""
        return mixed(groups(dataset, recordings, self.language_temperature), self.seed, make)
