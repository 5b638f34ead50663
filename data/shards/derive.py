"""A new dataset made of recordings of others: a choice of them, several joined, or with other labels and word times.

The sound is not copied: shards are hard links where the file system allows, and a link and its origin are the same
bytes for ever, since nobody writes to a finished shard. Only the index is new.
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
from data.format import index as ix
from data.format.dataset import Dataset, open_dataset
from data.format.index import Recording
from data.format.index_merge import write_dataset, write_rows

Entry = tuple[Dataset, int, Recording]
"""(where the sound is, the recording's number there, what the new dataset says of it)."""


def beside(out: Path, kind: str) -> Path:
    """Hidden path beside a folder, deterministic and short: the folder's name may already have the maximum length."""
    return out.with_name(f".{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]}.{kind}")


def derive(out: str | os.PathLike[str], entries: Iterable[Entry], name: str = "") -> Dataset:
    """Write a dataset of the given recordings; the folder appears when it is complete.

    Args:
        out: the new folder, which must not exist.
        entries: any order; ids must differ. Taken one after another, so a generator keeps memory bounded.
        name: what reports call it.
    Raises:
        UserError: `out` exists, datasets of different features, two recordings with one id, or none at all.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: choose another folder, or delete it")
    temporary, lock = beside(out, "tmp"), beside(out, "lock")  # a killed attempt's remains make room for the next
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with ix.locked(lock):
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
        raise UserError(f"{out}: cannot be written ({error}); nothing of it is left, the sources are whole") from error
    return open_dataset(out)


def _write(folder: Path, entries: Iterable[Entry], name: str) -> None:
    shards: dict[tuple[Path, int], int] = {}
    first: Dataset | None = None
    parts: list[Path] = []
    remaining = iter(entries)
    while some := list(islice(remaining, ix.BATCH_ROWS)):
        first = first or some[0][0]
        rows = []
        for dataset, number, recording in some:
            if differing := difference(first.features, dataset.features):
                raise UserError(f"{first.path} and {dataset.path} differ in their features: {'; '.join(differing)}")
            if first.layout != dataset.layout:
                places = f"{first.path} ({first.layout}) and {dataset.path} ({dataset.layout})"
                raise UserError(f"{places} differ in their layout: prepare one of them again with the other's --layout")
            place = dataset.path, int(dataset.index.shard[number])
            if place not in shards:
                shards[place] = len(shards)
                _link(dataset.path / ix.shard_name(place[1]), folder / ix.shard_name(shards[place]))
            rows.append(_row(dataset, number) | ix.described(recording) | {"shard": shards[place]})
        parts.append(folder / f"rows-{len(parts):05d}.arrow")
        write_rows(parts[-1], rows, first.features.num_mels)
    if first is None:
        raise UserError(f"{folder}: no recordings were chosen, there is nothing to write")
    write_dataset(folder, parts, first.features, first.layout, name, len(shards))
    for part in parts:
        part.unlink()


def _row(dataset: Dataset, number: int) -> dict[str, Any]:
    """What the index says of a recording's sound."""
    index = dataset.index
    mean, std = dataset.mean_std(number)
    numbers = {name: int(getattr(index, name)[number]) for name in ("offset", "bytes", "frames")}
    lists = {name: index.value(name, number) for name in ("crc32", "block_bytes")}
    return {**numbers, **lists, "mean": mean, "std": std}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
