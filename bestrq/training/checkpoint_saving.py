"""Saving of checkpoints: copies of everything that one holds, and their writing in the background."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bestrq.training.background_writer import BackgroundWriter
from bestrq.training.checkpoint import COMPLETE, FORMAT, checkpoint_path, model_slots, plain_name, read_marker
from bestrq.training.checkpoint_files import collect_receipts, divide, shared_folder, write_share
from bestrq.training.process import World, unsharded, unwrap
from bestrq.training.tensor_files import Entries, TensorFile, write_files
from common.errors import UserError
from common.files import crc32_of, new_folder, write_file


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint in memory: training may go on while it is written."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """of the groups model, optimizer and extra: whole copies on the CPU of those that this rank writes or keeps"""
    files: dict[str, TensorFile]
    """all files of the checkpoint by name, equal on all ranks"""


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World,
    extra_tensors: Mapping[str, Tensor] | None = None,
    file_gigabytes: float = 2.0,
    kept: Sequence[str] = (),
) -> Snapshot:
    """Copy what a checkpoint holds, on each rank the tensors that it writes; called by all ranks.

    Args:
        state: JSON-able, equal on all ranks.
        extra_tensors: equal on all ranks; may be sharded.
        file_gigabytes: of CheckpointSettings.
        kept: groups of which rank 0 keeps all tensors.
    """
    groups = {"model": model_slots(model), "optimizer": _optimizer_tensors(model, optimizer)}
    groups["extra"] = dict(extra_tensors or {})
    sizes = {
        group: {name: tensor.numel() * tensor.element_size() for name, tensor in named.items()}
        for group, named in groups.items()
    }
    files = divide(sizes, 1e9 * file_gigabytes, world.size)
    tensors = {}
    for group, named in groups.items():
        mine = [file.tensors for file in files.values() if (file.group, file.rank) == (group, world.rank)]
        keeps_all = world.is_main and group in kept
        tensors[group] = gather_tensors(named, named.keys() if keeps_all else {name for part in mine for name in part})
    return Snapshot(step, state, tensors, files)


def submit_checkpoint(writer: BackgroundWriter, folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint in the background; all ranks must call it. Raises UserError if it cannot be begun."""
    final, world = checkpoint_path(folder, snapshot.step), writer.world
    others = {file.rank for file in snapshot.files.values()} - {0}
    if not others:
        writer.submit(write_checkpoint, folder, snapshot)
        return
    with _saving(final):
        temporary = shared_folder(final, world.is_main and read_marker(final) is not None, world)
    if temporary is not None and world.is_main:
        collect = partial(collect_receipts, temporary, others, lambda: writer.others_until)
        writer.submit(write_checkpoint, folder, snapshot, temporary, collect)
    elif temporary is not None and world.rank in others:
        write = _saving(final)(write_share)  # as a decorator: the same message on all ranks
        writer.submit_here(write, temporary, snapshot.files, snapshot.tensors, world.rank)


def write_checkpoint(
    folder: Path, snapshot: Snapshot, temporary: Path | None = None, collect: Callable[[], Entries] = dict
) -> None:
    """Write a checkpoint, on rank 0; an existing complete one of the same step is kept.

    Args:
        temporary: folder in which other ranks write their files.
        collect: waits for these files and returns their sizes and checksums.

    Raises:
        UserError: writing fails (a full disk); earlier checkpoints are not affected.
    """
    final = checkpoint_path(folder, snapshot.step)
    with _saving(final):
        if read_marker(final) is not None:
            collect()  # if saves of this step overlapped: the folder is removed once no other rank writes into it
            if temporary is not None:
                shutil.rmtree(temporary)
            return
        if final.exists():  # without marker: left by an interrupted save
            shutil.rmtree(final)
        with new_folder(final, temporary) as temporary:
            try:
                entries = write_files(temporary, snapshot.files, snapshot.tensors, rank=0)
            finally:  # also after a failure, as the folder is then removed
                others = collect()
            entries |= others
            files = {name: entries[name] for name in snapshot.files}
            path, document = temporary / "state.json", {"step": snapshot.step, "state": snapshot.state}
            path.write_text(json.dumps({"format": FORMAT, **document}, indent=1), encoding="utf-8")
            files[path.name] = {"bytes": path.stat().st_size, "crc32": crc32_of(path)}
        write_file(final / COMPLETE, json.dumps({"format": FORMAT, "files": files}, indent=1))


@contextmanager
def _saving(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot save the checkpoint {final}: {error}. Earlier checkpoints are untouched") from error


def gather_model(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Unsharded parameters and buffers by name in the plain module, on the CPU of rank 0; {} on the other ranks."""
    slots = model_slots(model)
    return gather_tensors(slots, slots.keys() if world.is_main else ())


def gather_tensors(tensors: Mapping[str, Tensor], kept: Collection[str]) -> dict[str, Tensor]:
    """Unsharded copies on the CPU of the tensors that this rank keeps; called by all ranks."""
    whole = {}
    for name, tensor in sorted(tensors.items()):  # same order on all ranks: full_tensor is a collective
        full = unsharded(tensor.detach())
        if name in kept:
            whole[name] = full.to("cpu", copy=True).contiguous()
    return whole


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by `STATE/PARAMETER`; parameters without a gradient so far have none."""
    names: dict[Tensor, str] = {parameter: plain_name(name) for name, parameter in unwrap(model).named_parameters()}
    states = ((names[parameter], values) for parameter, values in optimizer.state.items())
    return {f"{key}/{name}": value for name, values in states for key, value in values.items()}
