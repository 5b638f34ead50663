"""Ranks that are not there: a fake process group on a fake GPU, and the count of its collectives.

    with fake_world(256), Collectives() as collectives:
        ...  # FSDP2, or `torch.distributed` on tensors of device `cuda`
    print(collectives.counts)

Tensors on the CPU are real, so that code that reads lengths and positions there runs as in training; tensors on the GPU
have shapes and dtypes only. This process is rank 0, whose shards are the largest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.errors import UserError
from pipelines.fake_gpu import Attention, efficient_attention, fake_gpu

FSDP = "torch.distributed.fsdp._fully_shard"


class FakeDeviceMode(FakeTensorMode):
    """Fake tensors on the GPU, real ones on the CPU."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        on_gpu = device is not None and torch.device(device).type == "cuda"
        if not on_gpu and not any(isinstance(leaf, FakeTensor | DTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


class OneStream:
    """Stream on which everything has happened already, and its events."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """The priority of a stream and the flags of an event have no effect."""

    def record_event(self, _: Any = None) -> OneStream:
        return self

    def record(self, _: Any = None) -> OneStream:
        return self

    def wait_stream(self, _: Any) -> None:
        pass

    wait_event = wait_stream


class NoStreams:
    """Part of `torch.cuda` that FSDP2 uses, on a machine without a GPU: one device with one stream."""

    Stream = Event = current_stream = OneStream
    stream = contextlib.nullcontext

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def is_initialized() -> bool:
        return True


def hide_gpus() -> None:
    """Make torch find no GPU in this process, as fake tensors need. Raises UserError if torch has used one already."""
    if torch.cuda.is_initialized():
        raise UserError("a dry run needs a process that has not used a GPU: start it as a command")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if torch.version.cuda is None:
        raise UserError(
            f"a dry run simulates GPUs with a CUDA build of torch (no GPU is needed), but this is {torch.__version__}: "
            "install the default build for Linux on x86-64"
        )


@contextlib.contextmanager
def fake_world(size: int, attention: Attention = efficient_attention) -> Iterator[None]:
    """Make this process rank 0 of `size`, with a fake GPU each; collectives move nothing.

    Raises UserError as `hide_gpus`.
    """
    hide_gpus()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        with contextlib.ExitStack() as stack:
            for module in ("_fsdp_param_group", "_fsdp_collectives", "_fsdp_state", "_fsdp_init"):
                stack.enter_context(mock.patch(f"{FSDP}.{module}._get_device_handle", lambda _: NoStreams))
            stack.enter_context(mock.patch("torch.distributed.device_mesh._get_device_handle", lambda *_: NoStreams))
            stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor))
            stack.enter_context(fake_gpu(attention, mode=FakeDeviceMode()))
            yield
    finally:
        dist.destroy_process_group()


KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
}
"""kind of collective, by the name of its operator in `torch.ops.c10d` and `torch.ops._c10d_functional`"""
NO_TRANSFER = {"wait_tensor", "barrier"}


@dataclass(frozen=True)
class Collective:
    """Kind of collective in a group."""

    kind: str
    ranks: int
    """of the group"""
    bytes: int
    """of the whole tensor: the output of an all-gather, the input of all others"""


class Collectives(TorchDispatchMode):
    """Count collectives by kind, size of the group and bytes. Raises RuntimeError for one that is not in `KINDS`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # its own operators follow
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name not in NO_TRANSFER:
            if name not in KINDS:
                raise RuntimeError(f"{func} is not in pipelines.fake_world.KINDS: add its kind")
            self.found.append(Collective(KINDS[name], _ranks(func, args), _largest(args, out)))
        return out


def _largest(args: Any, out: Any) -> int:
    """Bytes of the largest tensor of a collective: the whole one."""
    return max(leaf.numel() * leaf.element_size() for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor))


def _ranks(func: Any, args: Any) -> int:
    """Size of the process group among the arguments."""
    for value in args:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value).size()
        if isinstance(value, str) and func._schema.name.startswith("_c10d_functional"):
            with contextlib.suppress(RuntimeError):
                return torch._C._distributed_c10d._resolve_process_group(value).size()  # type: ignore[arg-type]
    raise RuntimeError(f"{func} has no process group among its arguments")
