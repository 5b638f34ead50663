"""Atomic, verified checkpoints in safetensors and JSON; loading one executes no code.

`step-00001000/` holds `model.safetensors`, `optimizer.safetensors`, `extra.safetensors` (further tensors of the
script), `state.json` and, written last, `COMPLETE`: a JSON list of every file with its size and CRC-32. A folder
without it is not a checkpoint. Tensors are stored unsharded under the names of the plain module, so a checkpoint loads
on any number of processes, with DDP or FSDP2. Optimizer tensors are named `STATE/PARAMETER`; hyperparameters come from
the settings. Complete checkpoints are never overwritten. The tensors of a large group are divided into files such as
`model-00001-of-00003.safetensors`, which all ranks write and verify in parallel. Saving is in checkpoint_saving.py.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from bestrq.training.process import World, unwrap
from common.errors import UserError
from common.files import as_object, crc32_of, read_json, remove_leftovers

FORMAT = 1
COMPLETE = "COMPLETE"
NAME = re.compile(r"step-(\d{8,})")


@dataclass
class CheckpointSettings:
    """Frequency and retention of checkpoints."""

    every_steps: PositiveInt = 1000
    """optimizer steps between two checkpoints; a stop and the end of the run save one too"""
    keep_last: PositiveInt = 2
    """number of newest checkpoints kept, besides the best one on dev"""
    keep_every: NonNegativeInt = 0
    """checkpoints of steps that are a multiple of this are kept too, for averages or later analysis; 0: none"""
    file_gigabytes: PositiveFloat = 2.0
    """size of a file from which on the weights, or the optimizer state, are divided into several files, which all
    processes write and verify in parallel"""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint besides model and optimizer."""

    path: Path
    step: int
    state: dict[str, Any]
    extra_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """memory-mapped: the files stay open as long as this object exists"""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`, existing or not."""
    return folder / f"step-{step:08d}"


def load_checkpoint(
    path: Path, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, world: World
) -> Checkpoint:
    """Load tensors into a model and an optimizer (either may be None) and return the rest of the checkpoint.

    Independent of strategy and world size: every rank reads its shard of the unsharded tensors. Raises UserError if a
    file is missing or damaged, or does not fit the model.
    """
    from bestrq.training.tensor_reading import read_group  # not at the top: a reader of the loop need not read these
    from bestrq.training.tensor_slots import fill, fill_optimizer

    path = Path(path)
    document = read_json(path / "state.json")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path / 'state.json'} is not of checkpoint format {FORMAT}")
    step, named = document.get("step"), NAME.fullmatch(path.resolve().name)
    if type(step) is not int or (named and step != int(named[1])):
        raise UserError(f"{path / 'state.json'} has step {step!r}, which is not that of its folder")
    if model is not None:
        stored = read_group(path, "model")
        fill(model_slots(model), stored, stored.source)
    if optimizer is not None:
        if model is None:
            raise ValueError("optimizer tensors are identified by the parameter names of the model: pass the model")
        parameters = {plain_name(name): parameter for name, parameter in unwrap(model).named_parameters()}
        fill_optimizer(optimizer, parameters, read_group(path, "optimizer"))
    state = as_object(document.get("state"), f"{path / 'state.json'}: state")
    return Checkpoint(path, step, state, read_group(path, "extra"))


def model_slots(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name in the plain module, as they are stored: under FSDP2, the shards."""
    return {plain_name(name): tensor for name, tensor in unwrap(model).state_dict().items()}


def plain_name(name: str) -> str:
    """Name in a module that is not compiled."""
    return name.replace("_orig_mod.", "")


def read_marker(path: Path) -> dict[str, tuple[int, int]] | None:
    """Size and CRC-32 of every file, by name, as listed in the marker; None without a readable marker."""
    try:
        files = read_json(path / COMPLETE)["files"]
        marker = {str(name): (int(entry["bytes"]), int(entry["crc32"])) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # UserError is a ValueError
        return None
    return marker if all(Path(name).name == name for name in marker) else None  # nothing outside the folder


def verify_checkpoint(path: Path, world: World | None = None) -> str | None:
    """Check marker, sizes and checksums of a checkpoint; returns the problem found, or None.

    The ranks of a world, which must all call it, share the work. Raises UserError if a rank finds damage that rank 0
    does not find: the storage of its machine is at fault, and not the checkpoint.
    """
    world = world or World()
    files = world.broadcast(read_marker(path) if world.is_main else None)
    if files is None:
        return f"{path.name} has no readable {COMPLETE} marker: its save was interrupted"
    damage, differing = None, None
    for rank, problem in enumerate(world.gather(_first_damage(path, files, world.rank, world.size))):
        if problem is not None and rank and _first_damage(path, files, rank, world.size) is None:
            differing = f"{problem} on rank {rank}, but not on rank 0: check the storage of the machine of that rank"
        elif problem is not None:
            damage = damage or problem
    damage, differing = world.broadcast([damage, differing])
    if differing and not damage:
        raise UserError(differing)
    return damage


def _first_damage(path: Path, files: Mapping[str, tuple[int, int]], rank: int, world_size: int) -> str | None:
    """Problem in the share of a rank of the files of a checkpoint, or None."""
    for name, (size, crc32) in list(files.items())[rank::world_size]:
        try:
            if (path / name).stat().st_size != size:
                return f"{path.name}/{name} has {(path / name).stat().st_size} bytes instead of {size}"
            if crc32_of(path / name) != crc32:
                return f"{path.name}/{name} does not match its checksum"
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            return f"{path.name}/{name} cannot be read: {error}"
    return None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of everything named like a checkpoint, oldest first, complete or not."""
    matches = ((NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def latest_checkpoint(folder: Path, world: World) -> Path | None:
    """Newest valid checkpoint, the same on all ranks; None if there is none.

    Those that rank 0 lists are verified byte by byte, newest first, by all ranks. A damaged one is reported on stderr
    and renamed to `damaged-...`, so that the run can save its step again. Temporary folders of interrupted saves are
    removed.
    """
    names = []
    if world.is_main and folder.is_dir():
        remove_leftovers(folder)
        names = [path.name for _, path in reversed(list_checkpoints(folder))]
    for path in [folder / name for name in world.broadcast(names)]:
        problem = verify_checkpoint(path, world)
        if problem is None:
            return path
        if world.is_main:
            print(f"checkpoint skipped: {problem}", file=sys.stderr)
            if read_marker(path) is not None:
                path.rename(path.with_name(f"damaged-{os.getpid()}-{path.name}"))
    return None


def prune_checkpoints(folder: Path, settings: CheckpointSettings, best_step: int | None = None) -> None:
    """Delete the checkpoints that the settings do not keep, and older incomplete ones; on rank 0.

    The marker is deleted first, so a partially deleted checkpoint is never loaded.
    """
    checkpoints = list_checkpoints(folder)
    complete = [step for step, path in checkpoints if read_marker(path) is not None]
    kept = {*complete[-settings.keep_last :], best_step}
    if settings.keep_every:
        kept |= {step for step in complete if step % settings.keep_every == 0}
    for step, path in checkpoints:
        if complete and step < complete[-1] and step not in kept:
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)
