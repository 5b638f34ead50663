"""Derived datasets: recordings of existing datasets, selected, merged, or with other labels and word times.

Shards are not copied but hard-linked if the file system allows it, which is safe because finished shards are never
modified. Only the index is new.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import sync
from data.features import difference
from data.format.dataset import DAMAGED, Dataset, open_dataset
from data.format.index_writer import metadata_row, write_dataset, write_rows
from data.format.schema import BATCH_ROWS, shard_name
from data.format.writer import locked
from data.recording import Recording

Entry = tuple[Dataset, int, Recording]
"""(source dataset, number of the recording there, metadata in the new dataset)."""


def hidden_sibling(out: Path, kind: str) -> Path:
    """Hidden path next to a folder: deterministic, and short because the folder's name may have the maximum length."""
    return out.with_name(f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]}.{kind}")


def derive(out: str | os.PathLike[str], entries: Iterable[Entry], name: str = "") -> Dataset:
    """Write a dataset of the given recordings. The folder appears when it is complete.

    Args:
        out: the new folder, which must not exist.
        entries: in any order, with distinct ids. A generator keeps memory bounded.
        name: name in reports.
    Raises:
        UserError: `out` exists, the sources differ in features or layout, two recordings share an id, or no entries.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: choose another folder, or delete it")
    # Leftovers of a killed process are replaced.
    temporary, lock = hidden_sibling(out, "tmp"), hidden_sibling(out, "lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                _write(temporary, entries, name or out.name)
                os.replace(temporary, out)
                sync(out.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); it was removed, the sources did not change") from error
    return open_dataset(out)


def _write(folder: Path, entries: Iterable[Entry], name: str) -> None:
    shards: dict[tuple[Path, int], int] = {}
    first: Dataset | None = None
    parts: list[Path] = []
    remaining = iter(entries)
    while batch := list(islice(remaining, BATCH_ROWS)):
        first = first or batch[0][0]
        rows = []
        for dataset, number, recording in batch:
            if differing := difference(first.features, dataset.features):
                raise UserError(f"{first.path} and {dataset.path} differ in their features: {'; '.join(differing)}")
            if first.encoding != dataset.encoding:
                places = f"{first.path} ({first.encoding}) and {dataset.path} ({dataset.encoding})"
                raise UserError(f"{places} differ in their layout: prepare one of them again with the other's --layout")
            place = dataset.path, int(dataset.index.shard[number])
            if place not in shards:
                shards[place] = len(shards)
                _link(dataset.path / shard_name(place[1]), folder / shard_name(shards[place]))
            rows.append(_value_columns(dataset, number) | metadata_row(recording) | {"shard": shards[place]})
        parts.append(folder / f"rows-{len(parts):05d}.arrow")
        write_rows(parts[-1], rows, first.features.num_mels)
    if first is None:
        raise UserError(f"{folder}: no recordings were selected")
    write_dataset(folder, parts, first.features, first.encoding, name, len(shards))
    for part in parts:
        part.unlink()


def _value_columns(dataset: Dataset, number: int) -> dict[str, Any]:
    """Columns of the index that describe a recording's values: position, size, checksums and statistics."""
    index = dataset.index
    mean, std = dataset.mean_std(number)
    numbers = {name: int(getattr(index, name)[number]) for name in ("offset", "bytes", "frames")}
    lists = {name: index.value(name, number) for name in ("crc32", "block_bytes")}
    return {**numbers, **lists, "mean": mean, "std": std}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def stored_recording(dataset: Dataset, recording: int) -> Recording:
    """All metadata of a recording of a dataset. Raises UserError if they are invalid."""
    labels = dataset.language(recording), dataset.speaker(recording), dataset.split(recording)
    words, excluded = dataset.words(recording), dataset.excluded(recording)
    try:
        return Recording(dataset.id(recording), dataset.text(recording), words, *labels, excluded)
    except UserError as error:
        raise UserError(f"{dataset.location}: {error}; {DAMAGED}") from error
