"""CUDA device that does not exist: tensors report device `cuda`, and their operators run on the CPU.

    with simulated_cuda() as gpu:
        pretrain.train(config)  # torch.cuda.is_available() is True, distributed.device=auto selects it
    print(gpu.waits.most_common())  # waits of the host by (reason, "file:line function")

Operators on a `CudaTensor` follow CUDA's rules of placement: a CPU tensor beside it raises, except a scalar (0-dim) in
a pointwise operator and the cases in which CUDA copies. A wait is an operation after which the host has waited for all
kernels in flight: a read of a value, an output whose shape depends on values, a copy in either direction that is not
`non_blocking`. Copies from pageable memory with `non_blocking` are counted apart: the driver copies them to a staging
buffer first, which takes the time of the host but does not wait for kernels.

Not simulated: speed, memory, streams (every kernel has finished at once, so a race is not found), compiled code (Dynamo
skips frames under a dispatch mode), FlexAttention, Triton's losses (the CPU's are computed, see cuda_losses.py), cuDNN
(its LSTM and CTC loss are replaced by torch's own kernels), CUDA's random numbers (the CPU's generators are used, so
that a run on the device equals one on the CPU), NCCL.

Waits inside kernels of torch 2.14 and torchaudio 2.11 were read in their sources; `HIDDEN_WAITS` lists them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves

from pipelines.cuda_runtime import allow_backward_without_a_gpu
from tests.gpu import cuda_losses
from tests.gpu.cuda_api import Generator, replacements
from tests.gpu.cuda_kernels import KERNELS, attention
from tests.gpu.host_clock import HostClock
from tests.gpu.places import place

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

HIDDEN_WAITS = {
    "_local_scalar_dense": (1, "read of a value"),
    "nonzero": (1, "shape depends on values"),
    "masked_select": (1, "shape depends on values"),
    "_unique2": (1, "shape depends on values"),
    "unique_dim": (1, "shape depends on values"),
    "unique_consecutive": (1, "shape depends on values"),
    "bincount": (2, "bincount reads minimum and maximum"),
    "equal": (1, "read of a comparison"),
    "_ctc_loss": (3, "ctc_loss copies lengths and offsets to the device"),
    "_ctc_loss_backward": (3, "ctc_loss copies lengths and offsets to the device"),
    "rnnt_loss_forward": (2, "rnnt_loss reads the largest lengths"),
    "_linalg_eigh": (1, "status of a decomposition"),
    "_linalg_svd": (1, "status of a decomposition"),
    "linalg_cholesky_ex": (1, "status of a decomposition"),
}
"""name of an operator -> number of waits, reason"""

INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
TAKES_CPU_SCALARS = {*INDEXING, aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_}
"""operators besides the pointwise ones that take a 0-dim CPU tensor"""
TAKES_CPU_TENSORS = {
    *(aten._use_cudnn_ctc_loss, aten._use_miopen_ctc_loss, aten._ctc_loss, aten._ctc_loss_backward),
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full),
}
"""operators that copy lengths from either device, or take only the shape or dtype of a tensor"""


class CudaTensor(torch.Tensor):
    """Tensor that reports device `cuda:0`, with its values in a CPU tensor."""

    content: Tensor
    """the values, on the CPU"""
    gpu: SimulatedCuda
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, content: Tensor, gpu: SimulatedCuda) -> CudaTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, content.size(), strides=content.stride(), storage_offset=content.storage_offset(), dtype=content.dtype,
            layout=content.layout, device=CUDA,
        )  # fmt: skip
        tensor.content, tensor.gpu = content, gpu
        return tensor

    def __init__(self, content: Tensor, gpu: SimulatedCuda) -> None:
        """Attributes are set in `__new__`."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CudaTensor({self.content!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Reached outside the mode only, for example in another thread.
        gpu = next(leaf.gpu for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, CudaTensor))
        return gpu.run(func, args, kwargs or {})

    def tolist(self) -> Any:
        self.gpu.wait("tolist")
        return self.content.tolist()

    # torch would build the index tensor of a list without calling the dispatch mode.
    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_lists_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_lists_as_tensors(index), value)


def _lists_as_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_lists_as_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


class SimulatedCuda(TorchDispatchMode):
    """The device: runs operators on the CPU, checks their placement and counts waits of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        """waits of the host by (reason, place)"""
        self.pageable: Counter[str] = Counter()
        """`non_blocking` copies from pageable memory by place, which do not wait"""
        self.kernels = 0
        """operators that launch at least one kernel"""
        self.clock: HostClock | None = None
        """measures the host's time between operators on the device; None: not measured"""
        self._pinned: dict[int, StorageWeakRef] = {}
        self.registered: dict[int, int] = {}
        """address -> bytes of memory given to `cudaHostRegister`"""

    @property
    def num_waits(self) -> int:
        return sum(self.waits.values())

    def wait(self, reason: str, count: int = 1) -> None:
        """Count waits of the host at the current place."""
        if count:
            self.waits[reason, place()] += count

    def wrap(self, value: Any) -> Any:
        """The results of an operator with tensors on the device in place of CPU tensors."""
        if isinstance(value, list | tuple):
            return type(value)(map(self.wrap, value))
        return CudaTensor(value, self) if isinstance(value, Tensor) else value

    # ---- Pinned memory: a property of the storage ----

    def pin(self, tensor: Tensor) -> Tensor:
        """The CPU tensor itself, whose storage counts as pinned from now on."""
        self._pinned[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        reference = self._pinned.get(tensor.untyped_storage()._cdata)
        if reference is not None and not reference.expired():
            return True
        address = tensor.data_ptr()
        return any(start <= address < start + size for start, size in self.registered.items())

    # ---- Operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator; on the device if a tensor or the argument `device` says so."""
        tensors: list[Tensor] = []
        _add_tensors(args, tensors)
        _add_tensors(kwargs.values(), tensors)
        to_cuda = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not to_cuda and not any(isinstance(tensor, CudaTensor) for tensor in tensors):
            return self._run_on_cpu(func, args, kwargs)
        if self.clock is None:
            return self._run_on_device(func, args, kwargs, tensors, to_cuda)
        self.clock.stop()
        try:
            return self._run_on_device(func, args, kwargs, tensors, to_cuda)
        finally:
            self.clock.start()

    def _run_on_cpu(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.clock is not None:
            self.clock.cpu_operators += 1
        if func.overloadpacket is aten.is_pinned:
            return self.is_pinned(args[0])
        if func.overloadpacket is aten._pin_memory:
            return self.pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self.pin(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)

    def _run_on_device(
        self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], to_cuda: bool
    ) -> Any:  # fmt: skip
        operator = func.overloadpacket
        if operator is aten._to_copy:
            return self._copy(args[0], kwargs, to_cuda)
        if operator is aten.copy_:
            return self._copy_into(*args, **kwargs)
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
        if on_cpu and operator not in TAKES_CPU_TENSORS:
            self._check_placement(func, args, on_cpu)
        if operator in INDEXING:
            self._count_indexing(args)
        self._count_hidden_waits(operator, args, kwargs)
        aliases = _aliases(func)
        self.kernels += aliases != "view"
        cpu_args, cpu_kwargs = [_values(value) for value in args], {k: _values(value) for k, value in kwargs.items()}
        if to_cuda:
            cpu_kwargs |= {"device": torch.device("cpu")}
        cpu_kwargs.pop("pin_memory", None)
        out = self.wrap(KERNELS.get(operator, func)(*cpu_args, **cpu_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, out) if aliases else out

    def _check_placement(self, func: Any, args: Any, on_cpu: list[Tensor]) -> None:
        """Raise RuntimeError if CUDA would refuse these CPU tensors among the operands."""
        operator = func.overloadpacket
        if operator in INDEXING:
            if not isinstance(args[0], CudaTensor):
                raise RuntimeError(
                    f"{func}: indices should be either on cpu or on the device of the indexed tensor (cpu)"
                )
            on_cpu = [value for value in args[2:3] if isinstance(value, Tensor) and not isinstance(value, CudaTensor)]
        takes_scalars = torch.Tag.pointwise in func.tags or operator in TAKES_CPU_SCALARS
        written = func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], CudaTensor)
        if written or any(tensor.dim() > 0 or not takes_scalars for tensor in on_cpu):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in on_cpu)
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu: "
                f"{func} got CPU tensors of shape {shapes} at {place()}"
            )

    def _count_indexing(self, args: Any) -> None:
        indices = [index for index in args[1] if index is not None]
        is_mask = len(indices) == 1 and indices[0].dtype in (torch.bool, torch.uint8)
        value = args[2] if len(args) > 2 else None
        # torch writes a scalar of the CPU by masked_fill.
        if is_mask and isinstance(value, Tensor) and value.numel() == 1 and not isinstance(value, CudaTensor):
            self.wait("copy of a CPU mask", int(not isinstance(indices[0], CudaTensor)))
            return
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8):
                on_cpu = not isinstance(index, CudaTensor)
                # The positions of a CPU mask are found on the CPU and copied, one tensor per dimension.
                self.wait("index by a CPU mask" if on_cpu else "index by a mask", index.dim() if on_cpu else 1)
            elif not isinstance(index, CudaTensor):
                self.wait("index by a CPU tensor")

    def _count_hidden_waits(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> None:
        name = operator.__name__
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("repeat_interleave reads size and sign", 2)
        if name == "_ctc_loss":
            self.wait("ctc_loss reads lengths", sum(isinstance(lengths, CudaTensor) for lengths in args[2:4]))
        count, reason = HIDDEN_WAITS.get(name, (0, ""))
        self.wait(reason, count)

    def _copy(self, source: Tensor, kwargs: dict[str, Any], to_cuda: bool) -> Tensor:
        """`_to_copy`: a copy with another device or dtype."""
        options = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
        from_cuda = isinstance(source, CudaTensor)
        to_cuda = to_cuda or (from_cuda and kwargs.get("device") is None)
        self._count_copy(source, from_cuda, to_cuda, bool(kwargs.get("non_blocking")))
        self.kernels += 1
        # The dtype may be the same: the device's memory is not that of the CPU tensor.
        out = aten._to_copy.default(_values(source), **options)
        if to_cuda:
            return CudaTensor(out, self)
        return self.pin(out) if kwargs.get("non_blocking") else out  # torch allocates pinned memory for it

    def _copy_into(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """`copy_`."""
        to_cuda = isinstance(target, CudaTensor)
        asynchronous = non_blocking and (to_cuda or self.is_pinned(target))
        self._count_copy(source, isinstance(source, CudaTensor), to_cuda, asynchronous)
        self.kernels += 1
        _values(target).copy_(_values(source))
        return target

    def _count_copy(self, source: Tensor, from_cuda: bool, to_cuda: bool, asynchronous: bool) -> None:
        if from_cuda == to_cuda:
            return
        if not asynchronous:
            pageable = "" if from_cuda or self.is_pinned(source) else ", from pageable memory"
            self.wait(f"blocking copy to the {'device' if to_cuda else 'host'}{pageable}")
        elif to_cuda and not self.is_pinned(source):
            self.pageable[place()] += 1


# torch's tree functions would take most of the time of a run.
def _add_tensors(values: Any, tensors: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            _add_tensors(value, tensors)


def _values(value: Any) -> Any:
    """An argument with the CPU's tensors in place of those of the device."""
    if isinstance(value, CudaTensor):
        return value.content
    return [_values(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def _aliases(func: Any) -> str:
    """'view' or 'write' if an operator returns memory of its arguments; empty if it returns new tensors."""
    aliases = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
    if not aliases:
        return ""
    return "write" if any(alias.is_write for alias in aliases) else "view"


@contextlib.contextmanager
def simulated_cuda() -> Iterator[SimulatedCuda]:
    """Context with a simulated GPU, in this thread. Backward passes run in this thread too.

    Raises RuntimeError if torch has a real GPU, or is a build without CUDA.
    """
    allow_backward_without_a_gpu()
    gpu = SimulatedCuda()
    lift_on_cpu = torch._C._only_lift_cpu_tensors()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, replacement in replacements(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        # Methods of the class, as a loader's thread calls them outside the mode.
        methods: dict[str, Callable[..., Any]] = {
            "pin_memory": lambda self, *device: self if gpu.is_pinned(self) else gpu.pin(self.clone()),
            "is_pinned": lambda self, *device: gpu.is_pinned(self),
            "record_stream": lambda self, stream: None,
        }
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, method))
        for module, name, loss in cuda_losses.REPLACEMENTS:
            stack.enter_context(mock.patch.object(module, name, loss))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_attach_out_of_memory_observer", lambda observer: None))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        # `torch.tensor(..., device="cuda")` copies through the dispatch mode instead of torch's real CUDA.
        torch._C._set_only_lift_cpu_tensors(True)
        # `module.to("cuda")` replaces the parameters, as a CudaTensor does not fit into one of the CPU.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            with gpu:
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lift_on_cpu)
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
