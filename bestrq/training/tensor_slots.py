"""Slots for stored tensors: parameters, buffers and optimizer state, whole or sharded by FSDP2.

Stored tensors are whole. A rank copies its shard from them, so that it reads no more than that of a memory-mapped file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bestrq.training.process import local
from bestrq.training.tensor_reading import StoredTensors
from common.errors import UserError


def misfits(slots: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Descriptions of the tensors that are missing, unknown, or of another shape than the slot of their name."""
    wrong = [f"{name} is missing" for name in sorted(slots.keys() - tensors.keys())]
    wrong += [f"{name} is not in the model" for name in sorted(tensors.keys() - slots.keys())]
    for name in sorted(slots.keys() & tensors.keys()):
        if slots[name].shape != (shape := tensors[name].shape):
            wrong.append(f"{name} is {list(shape)}, but the model has {list(slots[name].shape)}")
    return wrong


@torch.no_grad()
def fill(slots: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy whole tensors into the slots of the same names. Raises UserError, which names `source`, on misfits."""
    if wrong := misfits(slots, tensors):
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{source} does not fit the model: {'; '.join(wrong[:5])}{more}")
    for name, slot in slots.items():
        _copy(slot, tensors[name])


@torch.no_grad()
def fill_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: StoredTensors) -> None:
    """Replace the state of an optimizer by tensors `STATE/PARAMETER`, given the parameters of the model by name."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        path, parameter = tensors.path(key), parameters.get(name)
        if parameter is None or parameter not in trained:
            raise UserError(f"{path} holds {key}, but the optimizer has no parameter {name}")
        if tensor.ndim and tensor.shape != parameter.shape:
            raise UserError(f"{path}: {key} is {list(tensor.shape)}, but {name} is {list(parameter.shape)}")
        # Fused AdamW requires its step counter (0-d) on the device of the parameter; moments are sharded like it.
        if tensor.ndim:
            _copy(value := torch.empty_like(parameter, dtype=tensor.dtype), tensor)
        else:
            value = tensor.to(parameter.device, copy=True)
        optimizer.state[parameter][kind] = value


def _copy(slot: Tensor, whole: Tensor) -> None:
    ours, part = local(slot), whole[region(slot)]
    if ours.shape != part.shape:  # copy_ would broadcast
        raise ValueError(f"a shard is {list(ours.shape)}, and its part of the whole tensor {list(part.shape)}")
    ours.copy_(part)


def region(slot: Any) -> tuple[slice, ...]:
    """Part of the whole tensor that this rank holds: all of it, or the shard of a DTensor, which may be empty."""
    start, stop = [0] * slot.ndim, list(slot.shape)
    for axis, placement in enumerate(getattr(slot, "placements", ())):
        if placement.is_shard():
            dim, mesh = placement.dim, slot.device_mesh
            length = -(-(stop[dim] - start[dim]) // mesh.size(axis))  # as torch.chunk: the last shards are shorter
            start[dim] = min(start[dim] + mesh.get_local_rank(axis) * length, stop[dim])
            stop[dim] = min(start[dim] + length, stop[dim])
    return tuple(map(slice, start, stop))
