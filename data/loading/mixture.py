"""Several datasets, or languages, mixed in shares of one's choice.

A mixture's epoch has as many crops as all its groups together, of which each group has a fixed share; a small group is
passed through several times in it, a large one in part, each in its own order. So crop k of epoch e is a pure function
here too, and the state of the data remains the same three integers.
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
from data.format.dataset import Dataset, Normalisation
from data.loading.order import Crops, CropTable, NoCrops, permute
from data.transcripts import Word

_PART = 6  # domain of the hash that gives every group a seed; data.order and data.rows have the others


@dataclass(frozen=True)
class MixturePart:
    """A dataset of a mixture."""

    dataset: str = ""
    """Folder or URL of the dataset."""
    weight: float = 0.0
    """Share of the training audio, relative to the other parts' weights; 0 in all parts: as their hours."""

    def __post_init__(self) -> None:
        if not self.dataset:
            raise UserError("data.mixture has a part without a dataset: give its folder")
        if not 0 <= self.weight < float("inf"):
            raise UserError(f"data.mixture: the weight of {self.dataset} is {self.weight}: give 0 or more")


class DatasetGroup(Dataset):
    """Several datasets as one: their recordings are numbered one after another, each keeps its own statistics.

    Raises:
        UserError: datasets of different features, or one that is given twice.
    """

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        for dataset in datasets[1:]:
            if differing := difference(datasets[0].features, dataset.features):
                places = f"{datasets[0].location} and {dataset.location}"
                raise UserError(f"data.mixture: {places} differ in their features: {'; '.join(differing)}")
        if len({dataset.fingerprint for dataset in datasets}) < len(datasets):
            raise UserError("data.mixture names a dataset twice: name it once, with a larger weight")
        if 0 in weights and any(weights):
            raise UserError("data.mixture: give a weight above 0 to every part, or to none")
        self.datasets, self.weights = list(datasets), list(weights)
        self.features = datasets[0].features
        names = [dataset.name for dataset in datasets]
        # Those of one corpus are all called like it.
        self.names = [d.location if names.count(d.name) > 1 else d.name for d in datasets]
        self.location = self.name = " + ".join(self.names)
        self.frames = np.concatenate([dataset.frames for dataset in datasets])
        self.total_frames = sum(dataset.total_frames for dataset in datasets)
        self.fingerprint = hashlib.sha256(" ".join(d.fingerprint for d in datasets).encode()).hexdigest()
        self.first = np.concatenate([[0], np.cumsum([len(dataset) for dataset in datasets])])

    def _of(self, recording: int) -> tuple[Dataset, int]:
        """The dataset of a recording, and its number there."""
        part = int(np.searchsorted(self.first, recording, side="right")) - 1
        return self.datasets[part], int(recording) - int(self.first[part])

    def identity(self) -> dict[str, str]:
        """As of one dataset, and every part's fingerprint by its field: an error then names the part that differs."""
        features = {name: value for name, value in self.datasets[0].identity().items() if name != "dataset"}
        parts = {f"data.mixture[{i}].dataset": dataset.fingerprint for i, dataset in enumerate(self.datasets)}
        return {**features, **parts, "dataset": self.fingerprint}

    def __reduce__(self) -> tuple[Any, ...]:
        return DatasetGroup, (self.datasets, self.weights)

    def id(self, recording: int) -> str:
        dataset, number = self._of(recording)
        return f"{self.names[self.datasets.index(dataset)]}/{dataset.id(number)}"

    def text(self, recording: int) -> str | None:
        dataset, number = self._of(recording)
        return dataset.text(number)

    def words(self, recording: int) -> list[Word] | None:
        dataset, number = self._of(recording)
        return dataset.words(number)

    def excluded(self, recording: int) -> list[tuple[float, float]] | None:
        dataset, number = self._of(recording)
        return dataset.excluded(number)

    def language(self, recording: int) -> str:
        dataset, number = self._of(recording)
        return dataset.language(number)

    def speaker(self, recording: int) -> str:
        dataset, number = self._of(recording)
        return dataset.speaker(number)

    def split(self, recording: int) -> str:
        dataset, number = self._of(recording)
        return dataset.split(number)

    def where(self, recording: int) -> str:
        dataset, number = self._of(recording)
        return dataset.place(number)

    def labels(self, name: str) -> tuple[list[str], np.ndarray]:
        tables = [dataset.labels(name) for dataset in self.datasets]
        values = sorted({value for names, _ in tables for value in names})
        codes = [np.searchsorted(values, names)[codes].astype(np.int32) for names, codes in tables]
        return values, np.concatenate(codes)

    def select(
        self, split: str | None = None, language: str | None = None, ids: Iterable[str] | None = None
    ) -> np.ndarray:
        """As of one dataset; `ids` are of the form 'dataset's name/id', with the location where names are the same."""
        numbers = super().select(split, language)
        if ids is None:
            return numbers
        wanted = set(ids)
        found = {self.id(i): i for i in numbers if self.id(i) in wanted}
        if missing := sorted(wanted - set(found)):
            raise UserError(f"{self.location}: no recording {missing[0]!r} ({len(missing)} ids are not among these)")
        return np.array(sorted(found.values()), np.int32)

    def read(self, recording: int, start: int = 0, stop: int | None = None, verify: bool = False) -> np.ndarray:
        dataset, number = self._of(recording)
        return dataset.read(number, start, stop, verify)

    def read_into(self, recording: int, start: int, out: np.ndarray) -> None:
        dataset, number = self._of(recording)
        dataset.read_into(number, start, out)

    def forget(self, recording: int, start: int, stop: int) -> None:
        dataset, number = self._of(recording)
        dataset.forget(number, start, stop)

    def statistics(self, recording: int, normalisation: Normalisation) -> tuple[Tensor, Tensor]:
        """Of the recording, or of its own dataset."""
        dataset, number = self._of(recording)
        return dataset.statistics(number, normalisation)


@dataclass(frozen=True)
class Group:
    """Recordings that are drawn from together."""

    recordings: np.ndarray
    """int32 [N]"""
    weight: float
    """Share of the training audio."""


def groups(dataset: Dataset, recordings: np.ndarray, temperature: float) -> list[Group]:
    """Recordings by dataset and language, with their shares of the audio, which sum to 1.

    A language with h of H hours has a share proportional to (h / H) ** temperature: 1 is as the hours are, 0 gives all
    languages the same (Conneau et al., "Unsupervised Cross-lingual Representation Learning at Scale", 2020). With
    weights of datasets this holds within each dataset, else over all of them.
    """
    parts = dataset.datasets if isinstance(dataset, DatasetGroup) else [dataset]
    weights = dataset.weights if isinstance(dataset, DatasetGroup) else [0.0]
    first = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    if temperature == 1 and not any(weights):
        return [Group(recordings, 1.0)]
    values, codes = dataset.labels("language")
    part_of = np.searchsorted(first, recordings, side="right") - 1
    if any(weights):
        for number in sorted(set(range(len(parts))) - set(np.unique(part_of).tolist())):
            message = "data.mixture: none of the recordings of %s is among those chosen, its weight goes to the others"
            logging.getLogger(__name__).warning(message, parts[number].name)
    key = part_of * len(values) + codes[recordings]
    found = np.unique(key).tolist()
    hours = {k: float(dataset.frames[recordings[key == k]].sum()) for k in found}

    def pool(k: int) -> int:
        """What shares a temperature: the languages of one dataset where datasets have weights, else all."""
        return k // len(values) if any(weights) else 0

    by_language: dict[tuple[int, int], float] = {}
    for k in found:
        place = pool(k), k % len(values)
        by_language[place] = by_language.get(place, 0.0) + hours[k]
    shares = {}
    for k in found:
        language = by_language[pool(k), k % len(values)]
        total = sum(h**temperature for (p, _), h in by_language.items() if p == pool(k))
        of_pool = weights[k // len(values)] if any(weights) else 1.0
        shares[k] = of_pool * language**temperature / total * hours[k] / language
    whole = sum(shares.values())
    return [Group(recordings[key == k], shares[k] / whole) for k in found]


def mixed(groups: Sequence[Group], seed: int, make: Callable[[np.ndarray, int], CropTable]) -> CropTable:
    """One order over the groups. make: (recordings, seed) -> the order of one group.

    Groups that no crop can be made of are left out with a warning. Raises NoCrops where that is all of them.
    """
    if len(groups) == 1:
        return make(groups[0].recordings, seed)
    tables, weights = [], []
    for number, group in enumerate(groups):
        try:
            tables.append(make(group.recordings, int(mix(_PART, seed, number) >> np.uint64(1))))
            weights.append(group.weight)
        except NoCrops as error:
            message = "a language or dataset of %d recordings is left out: %s"
            logging.getLogger(__name__).warning(message, len(group.recordings), error)
            nothing = error
    if not tables:
        raise nothing
    return MixedCrops(tables, weights, seed)


class MixedCrops(CropTable):
    """Orders mixed so that each has its share of the audio.

    Args:
        tables: the orders. A group's crops come in its own order, epoch after epoch of its own.
        weights: share of the audio of each, which need not sum to 1.
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
        self.first = np.concatenate([[0], np.cumsum(quotas)])  # of a mixture's epoch
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
        place = permute(k, len(self), self.seed, epoch)
        part = np.searchsorted(self.first, place, side="right") - 1
        columns = np.empty((5, len(place)), np.int64)
        for number in np.unique(part).tolist():
            mine = np.flatnonzero(part == number)
            table, quota = self.tables[number], int(self.first[number + 1] - self.first[number])
            # The group's crops are counted through all epochs of the mixture.
            own_epoch, own_k = np.divmod(epoch * quota + place[mine] - self.first[number], len(table))
            for of_epoch in np.unique(own_epoch).tolist():
                these = own_epoch == of_epoch
                found = table.crops(of_epoch, own_k[these])
                item = found.item + self.first_item[number]
                columns[:, mine[these]] = [found.recording, found.start, found.stop, found.seed, item]
        return Crops(*columns)

    def _cut(self, epoch: int, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of an epoch of the group's."""
        columns = np.empty((3, len(item)), np.int64)
        part = np.searchsorted(self.first_item, item, side="right") - 1
        for number in np.unique(part).tolist():
            mine = part == number
            columns[:, mine] = self.tables[number]._cut(epoch, item[mine] - self.first_item[number])
        return columns[0], columns[1], columns[2]
