"""Mixtures of datasets or languages with given shares of the training audio.

The number of crops in an epoch of a mixture is the total over its groups, and each group has a fixed share of them. A
small group is repeated several times per epoch, and a large group is used in part; each has its own order. Crop k of
epoch e is still a pure function of (seed, e, k), and the position in the data is still three integers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.hashing import mix
from data.features import difference
from data.format.dataset import STD_FLOOR, Dataset, Normalisation
from data.loading.order import Crops, CropTable, NoCrops, permute
from data.transcripts import Word

_GROUP = 6  # domain of the hash for the seeds of groups; order.py and rows.py have the others


class DatasetGroup(Dataset):
    """Concatenation of datasets; every recording keeps the statistics of its own dataset.

    Raises:
        UserError: datasets with different features, or a dataset that is given twice.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        for dataset in datasets[1:]:
            if differing := difference(datasets[0].features, dataset.features):
                places = f"{datasets[0].location} and {dataset.location}"
                raise UserError(f"data.mixture: {places} differ in their features: {'; '.join(differing)}")
        if len({dataset.fingerprint for dataset in datasets}) < len(datasets):
            raise UserError("data.mixture has the same dataset twice: give it once, with a larger weight")
        if 0 in weights and any(weights):
            raise UserError("data.mixture: give a weight above 0 to every part, or to none")
        self.datasets, self.weights = list(datasets), list(weights)
        self.features = datasets[0].features
        names = [dataset.name for dataset in datasets]
        # Datasets of one corpus have the same name.
        self.names = [d.location if names.count(d.name) > 1 else d.name for d in datasets]
        self.location = self.name = " + ".join(self.names)
        self.frames = np.concatenate([dataset.frames for dataset in datasets])
        self.total_frames = sum(dataset.total_frames for dataset in datasets)
        self.fingerprint = hashlib.sha256(" ".join(d.fingerprint for d in datasets).encode()).hexdigest()
        self.first = np.concatenate([[0], np.cumsum([len(dataset) for dataset in datasets])])

    def _locate(self, recording: int) -> tuple[Dataset, int]:
        """Dataset of a recording, and its index there."""
        part = int(np.searchsorted(self.first, recording, side="right")) - 1
        return self.datasets[part], int(recording) - int(self.first[part])

    def identity(self) -> dict[str, str]:
        """Identity of a dataset, and the fingerprint of every part, so that an error names the part that differs."""
        features = {name: value for name, value in self.datasets[0].identity().items() if name != "dataset"}
        parts = {f"data.mixture[{i}].dataset": dataset.fingerprint for i, dataset in enumerate(self.datasets)}
        return {**features, **parts, "dataset": self.fingerprint}

    def __reduce__(self) -> tuple[Any, ...]:
        return DatasetGroup, (self.datasets, self.weights)

    def id(self, recording: int) -> str:
        dataset, number = self._locate(recording)
        return f"{self.names[self.datasets.index(dataset)]}/{dataset.id(number)}"

    def text(self, recording: int) -> str | None:
        dataset, number = self._locate(recording)
        return dataset.text(number)

    def words(self, recording: int) -> list[Word] | None:
        dataset, number = self._locate(recording)
        return dataset.words(number)

    def excluded(self, recording: int) -> list[tuple[float, float]] | None:
        dataset, number = self._locate(recording)
        return dataset.excluded(number)

    def language(self, recording: int) -> str:
        dataset, number = self._locate(recording)
        return dataset.language(number)

    def speaker(self, recording: int) -> str:
        dataset, number = self._locate(recording)
        return dataset.speaker(number)

    def split(self, recording: int) -> str:
        dataset, number = self._locate(recording)
        return dataset.split(number)

    def place(self, recording: int) -> str:
        dataset, number = self._locate(recording)
        return dataset.place(number)

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        tables = [dataset.labels(name) for dataset in self.datasets]
        values = sorted({value for names, _ in tables for value in names})
        codes = [np.searchsorted(values, names)[codes].astype(np.int32) for names, codes in tables]
        return values, np.concatenate(codes)

    def select(
        self, split: str | None = None, language: str | None = None, ids: Iterable[str] | None = None
    ) -> np.ndarray:
        """Like `Dataset.select`; ids are 'NAME/ID', with the location in place of names that are not unique."""
        recordings = super().select(split, language)
        if ids is None:
            return recordings
        wanted = set(ids)
        selected = {self.id(i): i for i in recordings if self.id(i) in wanted}
        if missing := sorted(wanted - set(selected)):
            raise UserError(f"{self.location}: no recording {missing[0]!r} ({len(missing)} ids do not exist)")
        return np.array(sorted(selected.values()), np.int32)

    def read(self, recording: int, start: int = 0, stop: int | None = None, verify: bool = False) -> np.ndarray:
        dataset, number = self._locate(recording)
        return dataset.read(number, start, stop, verify)

    def read_into(self, recording: int, start: int, out: np.ndarray) -> None:
        dataset, number = self._locate(recording)
        dataset.read_into(number, start, out)

    def forget(self, recording: int, start: int, stop: int) -> None:
        dataset, number = self._locate(recording)
        dataset.forget(number, start, stop)

    def statistics(
        self, recording: int, normalisation: Normalisation, std_floor: float = STD_FLOOR
    ) -> tuple[Tensor, Tensor]:
        """Statistics of the recording, or of its own dataset."""
        dataset, number = self._locate(recording)
        return dataset.statistics(number, normalisation, std_floor)


@dataclass(frozen=True)
class Group:
    """Recordings with a common share of the training audio."""

    recordings: np.ndarray
    """int32 [N]"""
    weight: float
    """Share of the training audio."""


def groups(dataset: Dataset, recordings: np.ndarray, temperature: float) -> list[Group]:
    """Recordings by dataset and language, with shares of the audio that sum to 1.

    A language with h of H hours has a share proportional to (h / H) ** temperature: 1 keeps the distribution of hours,
    0 gives equal shares (Conneau et al., "Unsupervised Cross-lingual Representation Learning at Scale", 2020). This
    holds within each dataset if datasets have weights, otherwise over all of them.
    """
    parts = dataset.datasets if isinstance(dataset, DatasetGroup) else [dataset]
    weights = dataset.weights if isinstance(dataset, DatasetGroup) else [0.0]
    first = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    if temperature == 1 and not any(weights):
        return [Group(recordings, 1.0)]
    values, codes = dataset.labels("language")
    recording_part = np.searchsorted(first, recordings, side="right") - 1
    if any(weights):
        for number in sorted(set(range(len(parts))) - set(np.unique(recording_part).tolist())):
            message = "data.mixture: no recording of %s is selected; its weight is distributed among the other datasets"
            logging.getLogger(__name__).warning(message, parts[number].name)
    key = recording_part * len(values) + codes[recordings]
    keys = np.unique(key).tolist()
    frames = {k: float(dataset.frames[recordings[key == k]].sum()) for k in keys}

    def pool(k: int) -> int:
        """Pool within which the shares of languages are computed: a dataset if datasets have weights, else all (0)."""
        return k // len(values) if any(weights) else 0

    language_frames: dict[tuple[int, int], float] = {}
    for k in keys:
        language = pool(k), k % len(values)
        language_frames[language] = language_frames.get(language, 0.0) + frames[k]
    shares = {}
    for k in keys:
        language_total = language_frames[pool(k), k % len(values)]
        total = sum(count**temperature for (p, _), count in language_frames.items() if p == pool(k))
        pool_share = weights[k // len(values)] if any(weights) else 1.0
        shares[k] = pool_share * language_total**temperature / total * frames[k] / language_total
    total_share = sum(shares.values())
    return [Group(recordings[key == k], shares[k] / total_share) for k in keys]


def mixed(groups: Sequence[Group], seed: int, make: Callable[[np.ndarray, int], CropTable]) -> CropTable:
    """Order over all groups; `make(recordings, seed)` returns the order of one group.

    Groups without crops are left out with a warning. Raises NoCrops if no group has any.
    """
    if len(groups) == 1:
        return make(groups[0].recordings, seed)
    tables, weights = [], []
    for number, group in enumerate(groups):
        try:
            tables.append(make(group.recordings, int(mix(_GROUP, seed, number) >> np.uint64(1))))
            weights.append(group.weight)
        except NoCrops as error:
            message = "a language or dataset of %d recordings is left out: %s"
            logging.getLogger(__name__).warning(message, len(group.recordings), error)
            no_crops = error
    if not tables:
        raise no_crops
    return MixedCrops(tables, weights, seed)


class MixedCrops(CropTable):
    """Orders mixed by shares of the audio.

    Args:
        tables: orders of the groups. The crops of a group follow its own order through its own epochs.
        weights: share of the audio of every group; need not sum to 1.
    """

    def __init__(self, tables: Sequence[CropTable], weights: Sequence[float], seed: int) -> None:
        self.tables, self.seed = list(tables), seed
        self.max_frames = max(table.max_frames for table in tables)
        self.min_frames = min(table.min_frames for table in tables)
        self.labelled = any(table.labelled for table in tables)
        self.texts = [text for table in tables for text in table.texts]
        per_crop = np.array([weight / table.mean_frames for weight, table in zip(weights, tables, strict=True)])
        sizes = np.array([len(table) for table in tables])
        quotas = np.maximum(1, np.round(sizes.sum() * per_crop / per_crop.sum())).astype(np.int64)
        self.first = np.concatenate([[0], np.cumsum(quotas)])  # within an epoch of the mixture
        self.first_item = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def items(self) -> int:
        return int(self.first_item[-1])

    @property
    def mean_frames(self) -> float:
        quotas = np.diff(self.first)
        return float(quotas @ [table.mean_frames for table in self.tables] / quotas.sum())

    def settings(self) -> dict[str, int]:
        return {f"share of group {number}": int(quota) for number, quota in enumerate(np.diff(self.first))}

    def text(self, item: int) -> str:
        part = int(np.searchsorted(self.first_item, item, side="right")) - 1
        return self.tables[part].text(item - int(self.first_item[part]))

    def crops(self, epoch: int, k: np.ndarray) -> Crops:
        position = permute(k, len(self), self.seed, epoch)
        part = np.searchsorted(self.first, position, side="right") - 1
        columns = np.empty((5, len(position)), np.int64)
        for number in np.unique(part).tolist():
            members = np.flatnonzero(part == number)
            table, quota = self.tables[number], int(self.first[number + 1] - self.first[number])
            # The crops of a group are counted through all epochs of the mixture.
            group_epoch, group_k = np.divmod(epoch * quota + position[members] - self.first[number], len(table))
            for e in np.unique(group_epoch).tolist():
                in_epoch = group_epoch == e
                crops = table.crops(e, group_k[in_epoch])
                item = crops.item + self.first_item[number]
                columns[:, members[in_epoch]] = [crops.recording, crops.start, crops.stop, crops.seed, item]
        return Crops(*columns)

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Crops of the items; `epoch` counts the epochs of the group."""
        columns = np.empty((3, len(item)), np.int64)
        part = np.searchsorted(self.first_item, item, side="right") - 1
        for number in np.unique(part).tolist():
            members = part == number
            columns[:, members] = self.tables[number]._cut(epoch, item[members] - self.first_item[number])
        return columns[0], columns[1], columns[2]
