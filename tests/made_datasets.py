"""Small datasets of random log-mel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.features import FeatureSettings
from data.format.dataset import Dataset, open_dataset
from data.format.writer import DatasetWriter
from data.recording import Recording
from data.shards.integrity import find_faults

FEATURES = FeatureSettings()


def noise(frames: int, seed: int = 0, num_mels: int = 80) -> np.ndarray:
    """float32 [frames, num_mels] with the statistics of speech: mean -5, standard deviation 3, a mean per bin."""
    rng = np.random.default_rng(seed)
    return (rng.normal(0, 3, (frames, num_mels)) + np.linspace(-9, -1, num_mels)).astype(np.float32)


def make_dataset(
    folder: Path, lengths: Sequence[int], max_shard_bytes: int = 200_000, features: FeatureSettings = FEATURES
) -> Dataset:
    """Dataset with recordings r000, r001, ... of the given numbers of frames, in several shards."""
    with DatasetWriter(folder, features, max_shard_bytes) as writer:
        for number, frames in enumerate(lengths):
            recording = Recording(f"r{number:03d}", text=f"text {number}", language="en", speaker=f"s{number % 3}")
            writer.add(recording, noise(frames, number, features.num_mels))
        writer.finish()
    return open_dataset(folder)


def verify(dataset: Dataset, workers: int = 1) -> list[str]:
    """Problems of a dataset, one line each."""
    return [fault.problem for fault in find_faults(dataset, workers)]
