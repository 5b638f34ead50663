"""Distributed setup: ranks, collectives, DDP and FSDP2.

The same script runs as `python X.py`, under torchrun, and directly under SLURM's srun. All code that depends on the
backend (NCCL for tensors on CUDA, gloo for those on the CPU) is in this file; machine.py selects the device.

Gradient contract: the loss passed to `backward()` is the local sum divided by the *global* number of targets, and
`parallelise` *sums* gradients over ranks (torch averages by default). The gradients therefore equal those of one
process with the whole batch, for any world size and any distribution of targets over ranks.
"""

import contextlib
import datetime
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from jsonargparse.typing import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError

# Fields that may change when a run is resumed.
FREE_DISTRIBUTED_FIELDS = ("device", "strategy", "shard_size", "reshard", "threads", "bind_cpus", "timeout_minutes")


@dataclass
class DistributedSettings:
    """Processes, devices and precision."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp replicates the model in every process; fsdp shards weights, gradients and optimizer state (FSDP2); hsdp
    shards them within groups of shard_size processes, and replicates the shards across groups"""
    shard_size: NonNegativeInt = 0
    """hsdp: consecutive ranks in a group; 0: the processes of a node, so that only gradients cross the network"""
    reshard: bool = True
    """fsdp, hsdp: free the gathered weights of a block after its forward pass and gather them again for its backward
    pass; false keeps them until the last backward pass of the step, which takes their memory and saves the second
    gathering, and those of further micro-batches"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA, or the CPU of a machine without a GPU; a GPU that torch cannot use is an error"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of matrix products; weights stay float32. auto: bfloat16 if the hardware supports it, else float32"""
    threads: NonNegativeInt = 0
    """CPU threads per process; 0: OMP_NUM_THREADS if set (other than by torchrun, to 1), else the cores divided by the
    processes of the machine"""
    bind_cpus: bool = False
    """bind each process to its own cores, in the NUMA node of its GPU if Linux shows it; not under srun, which binds
    its tasks itself (--cpu-bind)"""
    timeout_minutes: PositiveFloat = 30.0
    """maximum time that a collective waits for the other processes"""

    def __post_init__(self) -> None:
        if self.shard_size and self.strategy != "hsdp":
            raise UserError(
                f"distributed.shard_size is {self.shard_size} with distributed.strategy {self.strategy!r}, which has "
                "no groups: give 0, or strategy hsdp"
            )


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process, and the collectives.

    All ranks must call every method, in the same order. `sum` runs on the device of its tensor, the others on the host.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, as a new tensor; the argument must be on `self.device` or the CPU."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def sum_on_host(self, *values: float) -> list[float]:
        """Sums over ranks of numbers of the host, in float64; the device goes on with its work meanwhile."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def max(self, value: float) -> float:
        """Maximum over ranks. Backends treat NaN differently: use `any(isnan)`."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.max(float(flag)) > 0

    def broadcast(self, value: Any) -> Any:
        """Value of rank 0, returned on all ranks; sent as JSON, not pickle."""
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.is_main else b""
        buffer = torch.zeros(int(self.max(len(content))), dtype=torch.uint8)
        if self.is_main:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(buffer, src=0)
        return json.loads(buffer.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """Each rank's JSON-able value in the order of ranks, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        content = json.dumps(value).encode()
        # Each rank fills its own row of zeros, so the sum over ranks has all rows: bytes of JSON, no pickle.
        rows = torch.zeros(self.size, int(self.max(len(content))), dtype=torch.uint8)
        rows[self.rank, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        rows = self.sum(rows)
        return [json.loads(row.numpy().tobytes().rstrip(b"\0")) for row in rows] if self.is_main else []

    def barrier(self) -> None:
        """Wait until all ranks have called this method."""
        self.any(False)

    def close(self) -> None:
        """Leave the process group, as the last call of a successful script."""
        if dist.is_initialized():
            dist.destroy_process_group()


class LaterRead:
    """Copy of a small tensor on the host, read once it has arrived, without waiting for what was queued after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


def start_world(settings: DistributedSettings, field: str = "distributed.device") -> World:
    """Join the launcher's process group (none for a single process) and select the device.

    Args:
        field: name of the setting of the device, for messages.

    Raises:
        UserError: CUDA is requested but unavailable, torch cannot use the GPU of the machine, a machine has fewer GPUs
            than processes, the cores of a task of srun are to be bound, the groups of hsdp are uneven, or torchrun has
            ended.
    """
    from bestrq.training import machine  # not at the top: a reader of the loop need not read these
    from bestrq.training.launch import end_with_torchrun, read_launch

    launch = read_launch(os.environ)
    if settings.strategy == "hsdp":
        from bestrq.training.sharding import group_size  # not at the top: only hsdp needs it

        group_size(settings.shard_size or launch.local_size, launch.size)
    end_with_torchrun(os.environ, launch)
    device = machine.select_device(settings.device, field, settings.bind_cpus, settings.threads, launch)
    cuda = device.type == "cuda"
    if launch.size > 1:
        names = {"RANK": launch.rank, "WORLD_SIZE": launch.size, "MASTER_ADDR": launch.address,
                 "MASTER_PORT": launch.port, "LOCAL_RANK": launch.local_rank}  # fmt: skip
        os.environ.update({name: str(value) for name, value in names.items()})
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            timeout=datetime.timedelta(minutes=settings.timeout_minutes),
            device_id=device if cuda else None,
        )
    return World(launch.rank, launch.local_rank, launch.size, device, launch.local_size)


def parallelise(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    settings: DistributedSettings,
    find_unused_parameters: bool = False,
) -> nn.Module:
    """Wrap a model in DDP or shard it with FSDP2; a single process gets the model unchanged.

    Weights and buffers of rank 0 are broadcast first. Under fsdp and hsdp every block is a unit, so that only one is
    gathered at a time, and the rest of the model is another unit. With bfloat16 the blocks are gathered in bfloat16,
    the rest (subsampling, heads) in float32; gradients are reduced in float32. DDP needs `find_unused_parameters` if
    part of the model does not contribute to the loss.
    """
    model.to(world.device)
    if world.size == 1:
        return model
    if settings.strategy != "ddp":
        from bestrq.training.sharding import group_size, make_mesh, shard  # not at the top: DDP does not need it

        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, src=0)
        assert settings.precision != "auto", "call resolve_precision first"
        group = world.size
        if settings.strategy == "hsdp":  # the maximum, as all ranks must have the same groups
            group = group_size(settings.shard_size or int(world.max(world.local_size)), world.size)
        mesh = make_mesh(world.device, world.size, group)
        return shard(model, blocks, mesh, settings.precision, settings.reshard)
    parallel = DistributedDataParallel(  # with device_ids, it would move labels and lengths from the CPU to the GPU
        model,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )
    parallel.register_comm_hook(None, _sum_bucket)
    return parallel


def _sum_bucket(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook that sums instead of averaging. DDP inspects the annotations, so they are not strings."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def unwrap(model: nn.Module) -> nn.Module:
    """Module wrapped by DDP; any other module unchanged."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def unsharded(tensor: Any) -> Tensor:
    """Whole tensor, gathered if FSDP2 has sharded it (a DTensor, whose import takes half a second)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Any) -> Tensor:
    """Shard of this rank; a tensor that is not sharded unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gradient_sync(model: Any, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Context of forward and backward of a micro-batch; gradients are reduced only if `enabled`, for the last one."""
    if hasattr(model, "keeps_gathered"):  # by FSDP2
        model.set_requires_gradient_sync(enabled)
        if model.keeps_gathered:
            model.set_reshard_after_backward(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def autocast(world: World, settings: DistributedSettings) -> torch.autocast:
    """Context that runs matrix products in the resolved precision."""
    assert settings.precision != "auto", "call resolve_precision first"
    return torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
