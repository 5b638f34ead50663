"""Is a dataset whole: its files, and every byte in them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from data import index as ix
from data.errors import DataError

if TYPE_CHECKING:
    from data.shards import Dataset

DAMAGED = "`python -m data.shards verify` lists all damage; restore the file or prepare the dataset again"


def check_files(dataset: Dataset) -> None:
    """Raise DataError that names every missing shard, or the shards cut short and the recordings beyond the cut."""
    end = dataset.index.offset + dataset.frames * (dataset.features.num_mels * ix.BYTES_PER_VALUE)
    beyond = np.flatnonzero(end > _sizes(dataset)[dataset.index.shard])
    if len(beyond):
        shards = sorted({ix.shard_name(shard) for shard in dataset.index.shard[beyond].tolist()})
        named = ", ".join(repr(dataset.id(recording)) for recording in beyond[:8])
        raise DataError(
            f"{dataset.location}: {', '.join(shards[:8])} cut short: {len(beyond)} recordings are not there whole "
            f"({named}{', ...' if len(beyond) > 8 else ''}); {DAMAGED}"
        )


def _sizes(dataset: Dataset) -> np.ndarray:
    """Bytes of every shard's file, by its number. Raises DataError where one is missing or no plain file."""
    shards = dataset.shards()
    sizes, missing = np.zeros(shards[-1] + 1, np.int64), []
    for shard in shards:
        name = ix.shard_name(shard)
        if (dataset.path / name).is_symlink():
            raise DataError(f"{dataset.path / name} is a symbolic link; a shard must be a file in its folder. Refused")
        size = dataset.storage.size(name)
        if size is None:
            missing.append(name)
        sizes[shard] = size or 0
    if missing:
        raise DataError(f"{dataset.path}: {len(missing)} shards are missing: {', '.join(missing[:8])}; {DAMAGED}")
    return sizes


def damage(dataset: Dataset, recording: int) -> str | None:
    """Read a whole recording against its checksums; what is wrong with it, or None."""
    frames = int(dataset.frames[recording])
    step = 16 * ix.CHECKSUM_FRAMES
    bad: list[int] = []
    for start in range(0, frames, step):
        values = np.empty((min(step, frames - start), dataset.features.num_mels), np.float16)
        try:
            dataset.read_into(recording, start, values)
        except DataError as error:
            return str(error)
        bad += dataset.bad_blocks(recording, start, values)
        if not np.isfinite(values).all():
            return f"{dataset.where(recording)}: NaN or infinite values"
    return f"{dataset.where(recording)}: the checksums of blocks {bad} are wrong" if bad else None


def verify(dataset: Dataset) -> list[str]:
    """Read every byte of a dataset against its checksums; one line for every bad recording."""
    numbers = tqdm(range(len(dataset)), "verify", unit=" recordings", disable=not sys.stderr.isatty(), leave=False)
    return [found for i in numbers if (found := damage(dataset, i)) is not None]
