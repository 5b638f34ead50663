"""Tensors of an imagined device, which compute on the CPU and count transfers between host and device.

They report device 'meta', so that code which asks for the device of a tensor treats them as not on the CPU. No
gradients.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
TO_HOST, TO_DEVICE = "to the host", "to the device"
READS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "bincount", "is_nonzero", "_unique2"}
"""operators that wait for a GPU; indexing with a bool mask does too"""
TAKES_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_"}


class DeviceTensor(Tensor):
    """Tensor of the imagined device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "DeviceTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of host_transfers()")


@contextmanager
def host_transfers() -> Iterator[Counter[str]]:
    """Context in which tensors of the imagined device compute; yields the number of its transfers in each direction."""
    device = _Device()
    with _Creation(), device:
        yield device.counts


class _Creation(TorchFunctionMode):
    """`torch.tensor` with values for the device, which would not reach the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and (device := kwargs.pop("device", None)) is not None:
            return torch.tensor(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class _Device(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        from_device = any(isinstance(leaf, DeviceTensor) for leaf in leaves)
        to_device = from_device
        name = func.overloadpacket.__name__
        if kwargs.get("device") is not None:
            to_device = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = torch.device("cpu")
        self._count(name, args, leaves, from_device, to_device)
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name.endswith("_") and not name.startswith("_"):
            return args[0]
        return tree_map(lambda x: DeviceTensor(x) if isinstance(x, Tensor) and to_device else x, result)

    def _count(self, name: str, args: Any, leaves: list[Tensor], from_device: bool, to_device: bool) -> None:
        on_host = [leaf for leaf in leaves if not isinstance(leaf, DeviceTensor)]
        if name == "_to_copy":
            self.counts[TO_DEVICE] += to_device and not from_device
            self.counts[TO_HOST] += from_device and not to_device
        elif name == "copy_":
            self.counts[TO_DEVICE] += bool(on_host) and isinstance(args[0], DeviceTensor)
            self.counts[TO_HOST] += bool(on_host) and isinstance(args[1], DeviceTensor)
        elif not from_device:
            return
        elif name in TAKES_INDICES:
            indices = [index for index in args[1] if index is not None]
            self.counts[TO_HOST] += sum(index.dtype == torch.bool for index in indices)
            self.counts[TO_DEVICE] += sum(not isinstance(index, DeviceTensor) for index in indices)
        else:
            self.counts[TO_HOST] += name in READS
            # A number of the host is an argument of the kernel.
            assert all(leaf.dim() == 0 for leaf in on_host), f"{name}: tensors of host and device"


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value
