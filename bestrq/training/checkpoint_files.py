"""Division of a checkpoint into files that all ranks write in parallel.

The ranks write into one temporary folder on the shared file system, each in its background thread. A thread must not
use collectives, so a rank reports to rank 0 by a small JSON file in that folder, its receipt: sizes and checksums, or
the problem. Rank 0 removes the receipts and completes the checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from pathlib import Path

from bestrq.training.process import World
from bestrq.training.tensor_files import Entries, Groups, TensorFile, write_files
from bestrq.training.tensor_reading import file_names
from common.files import read_json_object, sync, temporary_name, write_json

POLL = 0.1
"""seconds between two looks for receipts"""


def divide(sizes: Mapping[str, Mapping[str, int]], limit: float, world_size: int) -> dict[str, TensorFile]:
    """Divide the tensors of every group into files of at most `limit` bytes; a larger tensor is a file of its own.

    The files depend on sizes and names alone. Every rank writes consecutive files of about as many bytes; if no group
    is divided, rank 0 writes everything, which needs no agreement with other ranks.

    Args:
        sizes: bytes of every tensor, by group and name.
    """
    groups = {group: _parts(named, limit) for group, named in sizes.items()}
    names = [name for group, parts in groups.items() for name in file_names(group, len(parts))]
    contents = [(group, part) for group, parts in groups.items() for part in parts]
    ranks = world_size if len(names) > len(sizes) else 1
    weights = [sum(sizes[group][name] for name in part) for group, part in contents]
    middles = [2 * end - weight for end, weight in zip(accumulate(weights), weights, strict=True)]  # in half bytes
    total = max(1, 2 * sum(weights))
    owners = [min(middle * ranks // total, ranks - 1) for middle in middles]
    return {name: TensorFile(*content, rank) for name, content, rank in zip(names, contents, owners, strict=True)}


def _parts(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sorted(sizes.items()):
        if parts[-1] and filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return parts


def shared_folder(final: Path, exists: bool, world: World) -> Path | None:
    """Create the temporary folder of a checkpoint, on rank 0, and return it on all ranks; None if it `exists` there.

    Raises OSError on all ranks if it cannot be created.
    """
    temporary, problem = temporary_name(final), None
    if world.is_main and not exists:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = str(error)
    name, exists, problem = world.broadcast([temporary.name, exists, problem])
    if problem is not None:
        raise OSError(problem)
    return None if exists else final.with_name(name)


def write_share(folder: Path, files: Mapping[str, TensorFile], tensors: Groups, rank: int) -> None:
    """Write the files of a rank other than 0, then its receipt. Raises OSError if the disk fails."""
    entries: Entries = {}
    problem = None
    try:
        entries = write_files(folder, files, tensors, rank)
        for name in entries:
            sync(folder / name)
    except OSError as error:
        problem = f"{error} (rank {rank})"
    try:
        write_json(folder / _receipt(rank), {"files": entries, "problem": problem})
    except OSError as error:
        problem = problem or f"{error} (rank {rank})"
    if problem is not None:
        raise OSError(problem)


def collect_receipts(folder: Path, ranks: Iterable[int], until: Callable[[], float]) -> Entries:
    """Wait for the receipts of other ranks, remove them, and return the size and CRC-32 of their files.

    Args:
        until: end of the wait, by `time.monotonic`; may change meanwhile.

    Raises:
        OSError: a rank has failed, or left no receipt in time.
    """
    entries: Entries = {}
    problems = []
    missing = {_receipt(rank): rank for rank in ranks}
    while True:
        for name in missing.keys() & set(os.listdir(folder)):
            receipt = read_json_object(folder / name)
            (folder / name).unlink()
            entries |= receipt["files"]
            problems += [receipt["problem"]] if receipt["problem"] else []
            del missing[name]
        if not missing:
            break
        if time.monotonic() > until():
            problems.append(f"rank {min(missing.values())} has not written its files")
            break
        time.sleep(POLL)
    if problems:
        raise OSError(problems[0])
    return entries


def _receipt(rank: int) -> str:
    return f"rank-{rank}.json"
