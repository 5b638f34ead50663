"""Atomic, verified checkpoints in safetensors and JSON; loading one executes no code.

`step-00001000/` holds `model.safetensors`, `optimizer.safetensors`, `extra.safetensors` (further tensors of the
script), `state.json` and, written last, `COMPLETE`: a JSON list of every file with its size and CRC-32. A folder
without it is not a checkpoint. Tensors are stored unsharded under the names of the plain module, so a checkpoint loads
on any number of processes, with DDP or FSDP2. Optimizer tensors are named `STATE/PARAMETER`; hyperparameters come from
the settings. Complete checkpoints are never overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from bestrq.training.process import World, unsharded, unwrap
from bestrq.training.tensor_files import read_tensors, write_tensors
from common.errors import UserError
from common.files import as_object, crc32_of, new_folder, read_json, remove_leftovers, write_file

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


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint besides model and optimizer."""

    path: Path
    step: int
    state: dict[str, Any]
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`, existing or not."""
    return folder / f"step-{step:08d}"


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint in memory: training may go on while it is written."""

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    """of the groups model, optimizer and extra: unsharded copies on the CPU of rank 0, {} on the other ranks"""


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World,
    extra_tensors: dict[str, Tensor] | None = None,
) -> Snapshot:
    """Copy everything that a checkpoint holds; called by all ranks.

    `state` must be JSON-able, `extra_tensors` unsharded, and both equal on all ranks.
    """
    tensors = {
        "model": gather_model(model, world),
        "optimizer": gather_optimizer(model, optimizer, world),
        "extra": {name: tensor.detach().cpu().clone() for name, tensor in (extra_tensors or {}).items()},
    }
    return Snapshot(step, state, tensors)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint, on rank 0; an existing complete one of the same step is kept.

    Raises UserError if writing fails (a full disk); earlier checkpoints are not affected.
    """
    final = checkpoint_path(folder, snapshot.step)
    if _marker(final) is not None:
        return
    try:
        if final.exists():  # without marker: left by an interrupted save
            shutil.rmtree(final)
        files = {}
        with new_folder(final) as temporary:
            for name, group in snapshot.tensors.items():
                path = temporary / f"{name}.safetensors"
                with open(path, "wb") as file:
                    crc32 = write_tensors(file, group)
                files[path.name] = {"bytes": path.stat().st_size, "crc32": crc32}
            path, document = temporary / "state.json", {"step": snapshot.step, "state": snapshot.state}
            path.write_text(json.dumps({"format": FORMAT, **document}, indent=1), encoding="utf-8")
            files[path.name] = {"bytes": path.stat().st_size, "crc32": crc32_of(path)}
        write_file(final / COMPLETE, json.dumps({"format": FORMAT, "files": files}, indent=1))
    except OSError as error:
        raise UserError(f"cannot save the checkpoint {final}: {error}. Earlier checkpoints are untouched") from error


def gather_model(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Unsharded parameters and buffers by name in the plain module, on the CPU of rank 0; {} on the other ranks."""
    return gather_tensors(dict(unwrap(model).state_dict()), world)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Tensor]:
    """Unsharded optimizer state by `STATE/PARAMETER`, on rank 0; parameters without a gradient so far have none."""
    names = _parameter_names(model)
    states = ((names[parameter], values) for parameter, values in optimizer.state.items())
    return gather_tensors({f"{key}/{name}": value for name, values in states for key, value in values.items()}, world)


def gather_tensors(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Unsharded copies on the CPU of rank 0; {} on the other ranks."""
    whole = {}
    for name, tensor in sorted(tensors.items()):  # same order on all ranks: full_tensor is a collective
        full = unsharded(tensor.detach())
        if world.is_main:
            whole[name.replace("_orig_mod.", "")] = full.to("cpu", copy=True).contiguous()
    return whole


def _parameter_names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name.replace("_orig_mod.", "") for name, parameter in unwrap(model).named_parameters()}


def load_checkpoint(
    path: Path, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, world: World
) -> Checkpoint:
    """Load tensors into a model and an optimizer (either may be None) and return the rest of the checkpoint.

    Independent of strategy and world size: every rank reads the unsharded tensors and keeps its shard. Raises UserError
    if a file is missing or damaged, or does not fit the model.
    """
    path = Path(path)
    document = read_json(path / "state.json")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path / 'state.json'} is not of checkpoint format {FORMAT}")
    step, named = document.get("step"), NAME.fullmatch(path.resolve().name)
    if type(step) is not int or (named and step != int(named[1])):
        raise UserError(f"{path / 'state.json'} has step {step!r}, which is not that of its folder")
    if model is not None:
        fill(model_slots(model), read_tensors(path / "model.safetensors"), path / "model.safetensors")
    if optimizer is not None:
        if model is None:
            raise ValueError("optimizer tensors are identified by the parameter names of the model: pass the model")
        _load_optimizer(model, optimizer, path / "optimizer.safetensors")
    state = as_object(document.get("state"), f"{path / 'state.json'}: state")
    return Checkpoint(path, step, state, read_tensors(path / "extra.safetensors"))


def model_slots(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name in the plain module, as they are stored: under FSDP2, the shards."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in unwrap(model).state_dict().items()}


def misfits(slots: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Descriptions of the tensors that are missing, unknown, or of another shape than the slot of their name."""
    wrong = [f"{name} is missing" for name in sorted(slots.keys() - tensors.keys())]
    wrong += [f"{name} is not in the model" for name in sorted(tensors.keys() - slots.keys())]
    for name in sorted(slots.keys() & tensors.keys()):
        if slots[name].shape != tensors[name].shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}, but the model has {list(slots[name].shape)}")
    return wrong


@torch.no_grad()
def fill(slots: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    """Copy unsharded tensors into the slots of the same names, which may be sharded."""
    if wrong := misfits(slots, tensors):
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{source} does not fit the model: {'; '.join(wrong[:5])}{more}")
    for name, slot in slots.items():
        slot.copy_(_like(tensors[name], slot))


def _like(tensor: Tensor, slot: Any) -> Tensor:
    if not hasattr(slot, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # only for FSDP2

    whole = tensor.to(slot.device, slot.dtype)
    return distribute_tensor(whole, slot.device_mesh, slot.placements, src_data_rank=None)  # no communication needed


@torch.no_grad()
def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, source: Path) -> None:
    tensors = read_tensors(source)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for p, name in _parameter_names(model).items() if p in trained}
    optimizer.state.clear()
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            raise UserError(f"{source} holds {key}, but the optimizer has no parameter {name}")
        parameter = parameters[name]
        if tensor.ndim and tensor.shape != parameter.shape:
            raise UserError(f"{source}: {key} is {list(tensor.shape)}, but {name} is {list(parameter.shape)}")
        # Fused AdamW requires its step counter (0-d) on the device of the parameter; moments are sharded like it.
        value = _like(tensor, parameter) if tensor.ndim else tensor
        optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)


def _marker(path: Path) -> dict[str, Any] | None:
    """Size and CRC-32 of every file, by name, as listed in the marker; None without a readable marker."""
    try:
        document = read_json(path / COMPLETE)
        return {str(name): (int(entry["bytes"]), int(entry["crc32"])) for name, entry in document["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # UserError is a ValueError
        return None


def verify_checkpoint(path: Path) -> str | None:
    """Check marker, sizes and checksums of a checkpoint; returns the problem found, or None."""
    files = _marker(path)
    if files is None:
        return f"{path.name} has no readable {COMPLETE} marker: its save was interrupted"
    for name, (size, crc32) in files.items():
        try:
            if (path / name).stat().st_size != size:
                return f"{path.name}/{name} has {(path / name).stat().st_size} bytes instead of {size}"
            if crc32_of(path / name) != crc32:
                return f"{path.name}/{name} does not match its checksum"
        except OSError as error:
            return f"{path.name}/{name} cannot be read: {error}"
    return None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of everything named like a checkpoint, oldest first, complete or not."""
    matches = ((NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def latest_checkpoint(folder: Path, world: World) -> Path | None:
    """Newest valid checkpoint, chosen by rank 0 for all ranks; None if there is none.

    Candidates are verified byte by byte, newest first. A damaged one is reported on stderr and renamed to
    `damaged-...`, so that the run can save its step again. Temporary folders of interrupted saves are removed.
    """
    chosen = None
    if world.is_main and folder.is_dir():
        remove_leftovers(folder)
        for _, path in reversed(list_checkpoints(folder)):
            problem = verify_checkpoint(path)
            if problem is None:
                chosen = path.name
                break
            print(f"checkpoint skipped: {problem}", file=sys.stderr)
            if _marker(path) is not None:
                path.rename(path.with_name(f"damaged-{os.getpid()}-{path.name}"))
    chosen = world.broadcast(chosen)
    return None if chosen is None else folder / chosen


def prune_checkpoints(folder: Path, settings: CheckpointSettings, best_step: int | None = None) -> None:
    """Delete the checkpoints that the settings do not keep, and older incomplete ones; on rank 0.

    The marker is deleted first, so a partially deleted checkpoint is never loaded.
    """
    checkpoints = list_checkpoints(folder)
    complete = [step for step, path in checkpoints if _marker(path) is not None]
    kept = {*complete[-settings.keep_last :], best_step}
    if settings.keep_every:
        kept |= {step for step in complete if step % settings.keep_every == 0}
    for step, path in checkpoints:
        if complete and step < complete[-1] and step not in kept:
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)
