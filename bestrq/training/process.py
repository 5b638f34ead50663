"""One process or many: who I am, what I agree on with the others, and how the model is spread over us.

The same script runs as `python X.py`, under torchrun, and directly under SLURM's srun. Everything that depends on the
backend (gloo on CPU, NCCL on CUDA) is in this file.

Contract on gradients: the loss given to `backward()` is the local sum divided by the *global* number of targets, and
`parallelise` *sums* gradients over ranks (torch's own default averages). So the gradients are those of one process
with the whole batch, whatever the world size and however unevenly the targets fall.
"""

import contextlib
import ctypes
import datetime
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError

FREE_DISTRIBUTED_FIELDS = ("device", "strategy", "threads", "timeout_minutes")  # may change between two starts of a run


@dataclass
class DistributedSettings:
    """How the work is spread over processes, and on what it runs."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp keeps the whole model in every process; fsdp shards weights, gradients and optimizer state (FSDP2)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a GPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; weights stay float32. auto: bfloat16 if the hardware supports it, else float32."""
    threads: int = 0
    """CPU threads of every process; 0 shares the cores among the processes of a machine, or obeys OMP_NUM_THREADS."""
    timeout_minutes: float = 30.0
    """How long a collective waits for the other processes before it gives up."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UserError(f"distributed.threads must be 0 (automatic) or more, but is {self.threads}")
        if not self.timeout_minutes > 0:
            raise UserError(f"distributed.timeout_minutes must be above 0, but is {self.timeout_minutes}")


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process: ranks, counts, and where rank 0 listens."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read torchrun's variables, or those of a SLURM step (srun), or neither: one process.

    A batch script run by SLURM outside srun also sees SLURM_PROCID; only inside a step is SLURM_STEP_NUM_TASKS set.
    Raises UserError when a variable that must be there is missing or not a number.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            size = int(environment["WORLD_SIZE"])
            return Launch(
                rank=int(environment["RANK"]),
                local_rank=int(environment.get("LOCAL_RANK", "0")),
                size=size,
                local_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
                address=environment.get("MASTER_ADDR", "127.0.0.1"),
                port=int(environment.get("MASTER_PORT", "29500")),
            )
        if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
            # The step id moves the port, so that two steps of one job, or two jobs of one node, do not meet.
            spread = 97 * int(environment.get("SLURM_JOB_ID", "0")) + int(environment.get("SLURM_STEP_ID", "0"))
            return Launch(
                rank=int(environment["SLURM_PROCID"]),
                local_rank=int(environment["SLURM_LOCALID"]),
                size=int(environment["SLURM_STEP_NUM_TASKS"]),
                local_size=_tasks_of_node(environment),
                address=environment.get("MASTER_ADDR") or first_host(nodes),
                port=int(environment.get("MASTER_PORT", 20000 + spread % 10000)),
            )
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing from the environment of a distributed start") from error
    except ValueError as error:
        raise UserError(f"a variable of the distributed start is not a number: {error}") from error
    return Launch()


def first_host(nodes: str) -> str:
    """First name of a SLURM node list: `node[07-09,12],other` gives `node07`."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    if found is None:
        raise UserError(f"cannot read the SLURM node list {nodes!r}: set MASTER_ADDR")
    return found[1] + (found[2] or "") + found[3]


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Tasks on this node out of `2(x3),1`: the entry of SLURM_NODEID."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or "1")
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[0]


@dataclass(frozen=True)
class World:
    """This process among the others. Every method but `is_main` must be called by all ranks, in the same order."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; the tensor must lie on `self.device`."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: float) -> float:
        """Largest value over ranks. Not for NaN, which backends treat differently: use `any(isnan)`."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return float(tensor.item())

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes."""
        return self.max(float(flag)) > 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON-able value, on all ranks. Bytes of JSON, not pickle, go over the wire."""
        if self.size == 1:
            return value
        content = json.dumps(value).encode() if self.is_main else b""
        length = torch.tensor([len(content)], dtype=torch.int64, device=self.device)
        dist.broadcast(length, src=0)
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8, device=self.device)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(buffer, src=0)
        return json.loads(bytes(buffer.tolist()).decode())

    def gather(self, value: Any) -> list[Any]:
        """Each rank's JSON-able value in the order of ranks, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        content = json.dumps(value).encode()
        # Each rank fills its own row of zeros, so the sum over ranks has all rows: bytes of JSON, no pickle.
        rows = torch.zeros(self.size, int(self.max(len(content))), dtype=torch.uint8, device=self.device)
        rows[self.rank, : len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        rows = self.sum(rows)
        return [json.loads(row.numpy().tobytes().rstrip(b"\0")) for row in rows.cpu()] if self.is_main else []

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def close(self) -> None:
        """Leave the process group; the last thing that a script does when all went well."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start_world(settings: DistributedSettings) -> World:
    """Join the process group that the launcher describes (none for a single process) and pick the device.

    Raises UserError when CUDA is asked for and is not there, or a machine has fewer GPUs than processes.
    """
    launch = read_launch(os.environ)
    cuda = settings.device != "cpu" and torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise UserError("distributed.device is 'cuda', but torch finds no CUDA GPU here: use 'auto' or 'cpu'")
    if threads := _threads(settings, launch):
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    if not cuda:
        keep_freed_memory()
    else:
        count = torch.cuda.device_count()  # 1 where the scheduler shows every task only its own GPU
        if count > 1 and launch.local_rank >= count:
            raise UserError(f"{launch.local_size} processes on a machine with {count} GPUs: start {count}")
        device = torch.device("cuda", launch.local_rank % count)
        torch.cuda.set_device(device)
    if launch.size > 1:
        names = {"RANK": launch.rank, "WORLD_SIZE": launch.size, "MASTER_ADDR": launch.address,
                 "MASTER_PORT": launch.port, "LOCAL_RANK": launch.local_rank}  # fmt: skip
        os.environ.update({name: str(value) for name, value in names.items()})
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            timeout=datetime.timedelta(minutes=settings.timeout_minutes),
            device_id=device if cuda else None,
        )
    return World(launch.rank, launch.local_rank, launch.size, device)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensors; does nothing with another C library.

    By itself it maps every tensor above 32 MB anew, and the system zeroes its pages at the first touch: a quarter of
    the time of an encoder on an hour of sound, for which it pays in memory (`python -m benchmarks.context_cost`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h's numbers of the options
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)


def _threads(settings: DistributedSettings, launch: Launch) -> int:
    """Threads to set, or 0 to leave torch's own choice."""
    if settings.threads or launch.size == 1 or "OMP_NUM_THREADS" in os.environ:
        return settings.threads
    return max(1, len(os.sched_getaffinity(0)) // launch.local_size)


def parallelise(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    world: World,
    settings: DistributedSettings,
    find_unused_parameters: bool = False,
) -> nn.Module:
    """Spread a model over the world; a single process gets it back as it is.

    Rank 0's weights and buffers are given to all ranks first. `blocks` are sharded one by one, so that only one of
    them is whole at a time; the rest of the model is one more shard. Under fsdp with bfloat16 the blocks' weights are
    gathered in bfloat16, the rest (subsampling, quantizer, heads) in float32, and gradients are reduced in float32.
    `find_unused_parameters` is for DDP with a part of the model left out of the loss.
    """
    model.to(world.device)
    if world.size == 1:
        return model
    if settings.strategy == "fsdp":
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, src=0)
        return _shard(model, blocks, world, settings)
    parallel = DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )
    parallel.register_comm_hook(None, _sum_bucket)
    return parallel


def _sum_bucket(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: a sum where the default is a mean. DDP reads these annotations: no strings here."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _shard(model: nn.Module, blocks: Iterable[nn.Module], world: World, settings: DistributedSettings) -> nn.Module:
    mesh = init_device_mesh(world.device.type, (world.size,))
    assert settings.precision != "auto", "call resolve_precision first"
    low = torch.bfloat16 if settings.precision == "bfloat16" else None
    # Inputs are never cast: autocast does that where it is right, and the quantizer must see float32 features.
    for block in blocks:
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP's wrapper; any other module as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Around forward and backward of a micro-batch: exchange gradients only when `enabled`, on the last one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def autocast(world: World, settings: DistributedSettings) -> torch.autocast:
    """Context in which matrix products run in the resolved precision."""
    assert settings.precision != "auto", "call resolve_precision first"
    return torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
