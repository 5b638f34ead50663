"""Sharding by FSDP2, in one group of all processes or in several: hybrid sharding, on a mesh of two dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from common.errors import UserError


def group_size(ranks: int, size: int) -> int:
    """Number of consecutive ranks of a group of hsdp: `distributed.shard_size`, or the processes of a node.

    Raises UserError if it does not divide the number of processes `size`.
    """
    if size % ranks:
        raise UserError(
            f"distributed.strategy is hsdp with groups of {ranks} processes (distributed.shard_size, by default the "
            f"processes of a node), which do not divide the {size} processes: give a shard_size that divides {size}"
        )
    return ranks


def make_mesh(device: torch.device, size: int, group: int) -> DeviceMesh:
    """Mesh of all ranks, or of groups of consecutive ranks: `[groups, ranks of a group]`."""
    if group == size:
        return init_device_mesh(device.type, (size,))
    return init_device_mesh(device.type, (size // group, group), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, precision: str, reshard: bool) -> nn.Module:
    """Shard a model with FSDP2: every block is a unit, and the rest of the model another one.

    Gradients are summed in float32, within a group and across groups. With precision "bfloat16" the blocks are gathered
    in bfloat16, the rest in float32.

    Args:
        mesh: of `make_mesh`.
        reshard: free the gathered weights of a block after its forward pass. Otherwise they are kept until the last
            backward pass of a step (`keeps_gathered`, for `gradient_sync`).
    """
    low = torch.bfloat16 if precision == "bfloat16" else None
    # Inputs are not cast: autocast selects the dtype of each operator.
    for block in blocks:
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))
    for name in getattr(model, "inference_methods", ()):
        register_fsdp_forward_method(model, name)
    model.keeps_gathered = not reshard  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Without these, torch divides by the number of processes, and NCCL's reduction would be PREMUL_SUM.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # In this order around FSDP2's own hook, which would move labels and lengths from the CPU to the GPU.
    model.register_forward_pre_hook(_hide_host_tensors, prepend=True, with_kwargs=True)
    model.register_forward_pre_hook(_show_host_tensors, with_kwargs=True)
    return model


@dataclass(frozen=True)
class _OnHost:
    """Argument that stays on the CPU, in a class that FSDP2 does not search for tensors."""

    tensor: Tensor


def _hide_host_tensors(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def hide(value: Any) -> Any:
        return _OnHost(value) if isinstance(value, Tensor) and value.device.type == "cpu" else value

    return tuple(map(hide, args)), {name: hide(value) for name, value in kwargs.items()}


def _show_host_tensors(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    def show(value: Any) -> Any:
        return value.tensor if isinstance(value, _OnHost) else value

    return tuple(map(show, args)), {name: show(value) for name, value in kwargs.items()}
