"""Held-out rows for validation during pretraining: the same crops and masks at every validation of every run."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace

import numpy as np
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat

from common.errors import UserError
from data.format.dataset import Dataset
from data.loading.batch import Batch, DrawMask
from data.loading.loader import LoaderSettings, RowLoader
from data.loading.order import CropOrder, NoCrops


@dataclass(frozen=True)
class HeldoutSettings:
    """Masked loss and accuracy on held-out audio during pretraining."""

    split: str = "auto"
    """split to validate on; auto: dev if the dataset has it and data.split is train, otherwise no validation"""
    share: ClosedUnitInterval = 0.0
    """share of the recordings of data.split to validate on instead of a split; they are excluded from training"""
    every_steps: NonNegativeInt = 1000
    """optimizer steps between validations, in addition to the one at the end of the run; 0 disables validation"""
    max_seconds: PositiveFloat = 1800.0
    """maximum amount of audio, over all processes; it is kept in memory (32 KB per second)"""
    seed: int = 0
    """seed of the choice of recordings and crops, and of the masks"""

    def __post_init__(self) -> None:
        if self.share and self.split != "auto":
            raise UserError(
                f"validation.share is {self.share} and validation.split {self.split!r}: give only one of them"
            )


def split_recordings(
    dataset: Dataset, data: LoaderSettings, settings: HeldoutSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Recordings to train on and recordings to validate on, int32 [N] each; the latter are empty without validation.

    Raises UserError if the dataset lacks the split, the split is trained on, or the share selects none or all.
    """
    training = dataset.select(split=data.split)
    if settings.share:
        count = round(settings.share * len(training))
        if not 0 < count < len(training):
            raise UserError(
                f"validation.share is {settings.share}: that is {count} of the {len(training)} recordings of split "
                f"{data.split!r}; give a share that leaves recordings to train and to validate on"
            )
        is_heldout = np.zeros(len(training), bool)
        is_heldout[np.random.default_rng(settings.seed).permutation(len(training))[:count]] = True
        return training[~is_heldout], training[is_heldout]
    split = settings.split
    if split == "auto":
        split = "dev" if data.split == "train" and "dev" in dataset.labels("split")[0] else ""
    if not split or not settings.every_steps:
        return training, training[:0]
    if split == data.split:
        raise UserError(f"validation.split is {split!r}, the split to train on: give another split, or a share of it")
    try:
        return training, dataset.select(split=split)
    except UserError as error:
        raise UserError(f"validation.split is {split!r}: {error}") from error


def heldout_batches(
    dataset: Dataset,
    recordings: np.ndarray,
    data: LoaderSettings,
    settings: HeldoutSettings,
    *,
    multiple: int,
    row_gap: int,
    rank: int,
    world_size: int,
    accumulation: int,
    draw_mask: DrawMask,
) -> list[Batch]:
    """Read this rank's batches of held-out rows, with masks. All ranks have the same number of batches.

    Rows, crops and masks are a pure function of dataset and settings: they depend neither on `accumulation` nor on the
    number of processes and workers. Padding rows of the last batch have an empty mask, hence no targets. See
    `RowLoader` for the arguments.

    Raises:
        UserError: all recordings of an explicit split or share are below data.min_seconds, or some are unreadable.
    """
    if not len(recordings) or not settings.every_steps:
        return []
    rows = data.rows // accumulation  # per batch, over all ranks, as in a forward pass of training
    # All crops form one block, so that its first rows are a random sample of all recordings.
    data = replace(data, rows=rows, seed=settings.seed, num_workers=0, block_crops=sys.maxsize)
    try:
        crops = CropOrder(dataset.frames, *data.crop_frames(dataset), settings.seed, recordings)
    except NoCrops as error:
        if settings.split == "auto" and not settings.share:
            return []
        raise UserError(f"validation: {error}; lower data.min_seconds, or validate on other recordings") from error
    loader = RowLoader(
        dataset, crops, data, multiple=multiple, row_gap=row_gap, rank=rank, world_size=world_size, draw_mask=draw_mask
    )
    frames = [int((row.crops.stop - row.crops.start).sum()) for row in loader.stream.block(0, 0)]
    seconds = np.cumsum(frames) / dataset.features.frames_per_second
    num_rows = max(1, int((seconds <= settings.max_seconds).sum()))
    batches = list(itertools.islice(loader, -(-num_rows // rows)))
    for number, batch in enumerate(batches):
        assert batch[0].mask is not None
        first = number * rows + rank * (rows // world_size)
        batch[0].mask[max(0, num_rows - first) :] = False
    return [batch for [batch] in batches]
