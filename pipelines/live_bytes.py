"""Bytes of live tensors, counted operation by operation on the CPU or on a simulated GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class LiveBytes(TorchDispatchMode):
    """Count the storages that operations allocate, until they are freed. Earlier storages are not counted.

    Storages that FSDP2 frees and allocates again by resizing them count with their current size.

    Unlike autograd's saved-tensor hooks, this includes tensors that a checkpoint keeps outside the graph, and counts
    each storage once, regardless of the number of its views.
    """

    def __init__(self, device: str | None = None) -> None:
        """Args: device: type of the device whose storages are counted; None for all."""
        super().__init__()
        self.device = device
        self.now = self.peak = 0
        self.alive: dict[int, tuple[int, str]] = {}
        """by id of a storage: its bytes, and the operation, dtype and shape that allocated it"""
        self.output: Tensor | None = None
        """tensor to keep alive with the counter"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # the operators on its shards follow
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or self.device not in (None, tensor.device.type):
                continue
            if id(storage := tensor.untyped_storage()) not in inputs | self.alive.keys():
                origin = f"{func} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                self.alive[id(storage)] = (storage.nbytes(), origin)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, id(storage))
        return out

    def __enter__(self) -> LiveBytes:
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if id(storage) in self.alive:
                before, origin = self.alive[id(storage)]
                self.alive[id(storage)] = (size, origin)
                self.now += size - before
                self.peak = max(self.peak, self.now)

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)[0]

    def inventory(self) -> list[tuple[int, int, str]]:
        """Live storages as (total bytes, number, origin), largest first."""
        count = Counter(self.alive.values())
        return sorted(((size * n, n, origin) for (size, origin), n in count.items()), reverse=True)


def unbiased_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, **_: Any
) -> Tensor:
    """Fused kernel that a GPU uses for attention with a mask, without its additive mask."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout)[0]


@contextlib.contextmanager
def simulated_gpu(
    attention: Callable[..., Tensor] = unbiased_attention, mode: FakeTensorMode | None = None
) -> Iterator[FakeTensorMode]:
    """Simulate a GPU by fake tensors on the device 'cuda': the CUDA path runs, but operations compute only shapes.

    Forward only; `fake_gpu.fake_gpu` adds the backward pass.

    Args:
        attention: in place of `scaled_dot_product_attention`.
        mode: by default all tensors are fake, those on the CPU too.
    """
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mode or FakeTensorMode(allow_non_fake_inputs=True) as entered,
    ):
        yield entered


def on_gpu(value: Any) -> Any:
    """Move a tensor, or a dataclass or list of tensors, to the simulated GPU; call it inside `simulated_gpu`."""
    if isinstance(value, list):
        return [on_gpu(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: on_gpu(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"), value
    )
