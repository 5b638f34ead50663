"""Checkpoints that are whole or do not count, and that run no code when loaded.

`step-00001000/` holds `model.safetensors`, `optimizer.safetensors`, `extra.safetensors` (whatever tensors the script
adds), `state.json` and, last of all, `COMPLETE`: a JSON list of every file with its size and CRC-32. Tensors are stored
whole, under the plain module's names, whatever the strategy that saved them, so a checkpoint loads on any number of
processes, in DDP or FSDP. The optimizer's file holds `STATE/PARAMETER` tensors only; learning rates and the like come
from the settings. A checkpoint is never overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bestrq.training.process import World, unwrap
from common.errors import UserError
from common.files import crc32_of, sync, temporary_name, write_file

FORMAT = 1
COMPLETE = "COMPLETE"
NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint that cannot be used or written. The message names the file and what is wrong with it."""


@dataclass
class CheckpointSettings:
    """When to save, and what to keep."""

    every_steps: int = 1000
    """Updates between two checkpoints; there is also one at a stop and one at the end."""
    keep_last: int = 2
    """Newest checkpoints kept; the best one is kept besides."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"checkpoint.{name} must be 1 or more, but is {getattr(self, name)}")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` hands back beside the weights it has put in place."""

    path: Path
    step: int
    state: dict[str, Any]
    extra_tensors: dict[str, Tensor] = field(default_factory=dict)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, or would."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World,
    extra_tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Save everything at `step` and return the checkpoint's folder once all ranks may rely on it.

    Called by all ranks; rank 0 writes. `state` is JSON-able and `extra_tensors` whole, the same on all ranks. A
    complete checkpoint of the same step is left as it is. Raises CheckpointError on all ranks when writing fails (a
    full disk); earlier checkpoints are untouched.
    """
    final = checkpoint_path(folder, step)
    if world.broadcast(world.is_main and _marker(final) is not None):
        return final
    tensors = {
        "model": gather_model(model, world),
        "optimizer": gather_optimizer(model, optimizer, world),
        "extra": {name: tensor.detach().cpu().clone() for name, tensor in (extra_tensors or {}).items()},
    }
    problem = None
    if world.is_main:
        content = json.dumps({"format": FORMAT, "step": step, "state": state}, indent=1)
        try:
            _write(final, tensors, content)
        except (OSError, SafetensorError) as error:
            problem = f"cannot save the checkpoint {final}: {error}. Earlier checkpoints are untouched"
    problem = world.broadcast(problem)  # also the barrier after which the checkpoint is there for all
    if problem is not None:
        raise CheckpointError(problem)
    return final


def _write(final: Path, tensors: dict[str, dict[str, Tensor]], state: str) -> None:
    temporary = temporary_name(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
        for name, group in tensors.items():
            save_file(group, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(state, encoding="utf-8")
        files = {}
        for path in sorted(temporary.iterdir()):
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "crc32": crc32_of(path)}
        sync(temporary)
        if final.exists():  # without its marker: a save that was cut short, never a checkpoint
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(final.parent)
        write_file(final / COMPLETE, json.dumps({"format": FORMAT, "files": files}, indent=1))
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def gather_model(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Whole parameters and buffers on the CPU of rank 0, under the plain module's names; {} on the other ranks."""
    return _gather(dict(unwrap(model).state_dict()), world)


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Tensor]:
    """Whole optimizer state as `STATE/PARAMETER`, on rank 0; a parameter that never had a gradient has none."""
    names = _parameter_names(model)
    states = ((names[parameter], values) for parameter, values in optimizer.state.items())
    return _gather({f"{key}/{name}": value for name, values in states for key, value in values.items()}, world)


def _gather(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    whole = {}
    for name, tensor in sorted(tensors.items()):  # the same order everywhere: full_tensor is a collective
        tensor = tensor.detach()
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            whole[name.replace("_orig_mod.", "")] = full.to("cpu", copy=True).contiguous()
    return whole


def _parameter_names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name.replace("_orig_mod.", "") for name, parameter in unwrap(model).named_parameters()}


def load_checkpoint(
    path: Path, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, world: World
) -> Checkpoint:
    """Put a checkpoint's tensors into a model and an optimizer (either may be None) and return the rest.

    Works under any strategy and number of processes: every rank reads the whole tensors and keeps its shard. Raises
    CheckpointError when a file is missing, is not what it should be, or does not fit the model.
    """
    path = Path(path)
    document = _read_json(path / "state.json")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path / 'state.json'} is not of checkpoint format {FORMAT}")
    if model is not None:
        _fill(_model_slots(model), read_tensors(path / "model.safetensors"), path / "model.safetensors")
    if optimizer is not None:
        if model is None:
            raise ValueError("an optimizer's tensors are found by the names of its model's parameters: pass the model")
        _load_optimizer(model, optimizer, path / "optimizer.safetensors")
    return Checkpoint(path, int(document["step"]), document["state"], read_tensors(path / "extra.safetensors"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises CheckpointError naming the file; runs no code."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _model_slots(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in unwrap(model).state_dict().items()}


@torch.no_grad()
def _fill(slots: dict[str, Tensor], tensors: dict[str, Tensor], source: Path) -> None:
    """Copy whole tensors into the slots of the same names, which may be sharded."""
    wrong = [f"{name} is missing" for name in sorted(slots.keys() - tensors.keys())]
    wrong += [f"{name} is not in the model" for name in sorted(tensors.keys() - slots.keys())]
    for name in sorted(slots.keys() & tensors.keys()):
        if slots[name].shape != tensors[name].shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}, but the model has {list(slots[name].shape)}")
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(wrong[:5])}{more}")
    for name, slot in slots.items():
        slot.copy_(_like(tensors[name], slot))


def _like(tensor: Tensor, slot: Tensor) -> Tensor:
    if not isinstance(slot, DTensor):
        return tensor
    whole = tensor.to(slot.device, slot.dtype)
    return distribute_tensor(whole, slot.device_mesh, slot.placements, src_data_rank=None)  # every rank has it all


@torch.no_grad()
def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, source: Path) -> None:
    tensors = read_tensors(source)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for p, name in _parameter_names(model).items() if p in trained}
    optimizer.state.clear()
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            raise CheckpointError(f"{source} holds {key}, but the optimizer has no parameter {name}")
        parameter = parameters[name]
        if tensor.ndim and tensor.shape != parameter.shape:
            raise CheckpointError(f"{source}: {key} is {list(tensor.shape)}, but {name} is {list(parameter.shape)}")
        # Fused AdamW wants its step counter (0-d) on the parameter's device; moments are laid out as the parameter.
        value = _like(tensor, parameter) if tensor.ndim else tensor
        optimizer.state[parameter][kind] = value.to(parameter.device, copy=True)


def _marker(path: Path) -> dict[str, Any] | None:
    """The marker's list of files, if there is a marker that can be read."""
    try:
        document = _read_json(path / COMPLETE)
        return {str(name): (int(entry["bytes"]), int(entry["crc32"])) for name, entry in document["files"].items()}
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return None


def verify_checkpoint(path: Path) -> str | None:
    """What is wrong with a checkpoint (marker, sizes, every byte), or None."""
    files = _marker(path)
    if files is None:
        return f"{path.name} has no readable {COMPLETE} marker: its saving was cut short"
    for name, (size, crc32) in files.items():
        try:
            if (path / name).stat().st_size != size:
                return f"{path.name}/{name} has {(path / name).stat().st_size} bytes instead of {size}"
            if crc32_of(path / name) != crc32:
                return f"{path.name}/{name} does not have the checksum it was written with"
        except OSError as error:
            return f"{path.name}/{name} cannot be read: {error}"
    return None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a checkpoint, oldest first; says nothing about its worth."""
    found = ((NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_checkpoint(folder: Path, world: World) -> Path | None:
    """The newest whole checkpoint, chosen by rank 0 for all; None when there is none.

    Verifies every byte of the candidates, newest first, and says on stderr why one is passed over; that one is moved
    to `damaged-...`, out of the way of the run that will reach its step again. Leftovers of saves that were cut short
    are removed.
    """
    chosen = None
    if world.is_main and folder.is_dir():
        for leftover in folder.glob(".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for _, path in reversed(list_checkpoints(folder)):
            problem = verify_checkpoint(path)
            if problem is None:
                chosen = path.name
                break
            print(f"checkpoint passed over: {problem}", file=sys.stderr)
            if _marker(path) is not None:
                path.rename(path.with_name(f"damaged-{os.getpid()}-{path.name}"))
    chosen = world.broadcast(chosen)
    return None if chosen is None else folder / chosen


def prune_checkpoints(folder: Path, keep_last: int, best_step: int | None, world: World) -> None:
    """Rank 0 deletes checkpoints but the newest `keep_last` and the best, and older ones cut short. The marker goes
    first, so one that is half deleted is never chosen. Other ranks return at once: nobody reads what is deleted."""
    if not world.is_main:
        return
    found = list_checkpoints(folder)
    complete = [step for step, path in found if _marker(path) is not None]
    kept = {*complete[-max(1, keep_last) :], best_step}
    for step, path in found:
        if complete and step < complete[-1] and step not in kept:
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)
