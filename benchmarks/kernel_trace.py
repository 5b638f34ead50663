"""Operators of a step on the device, with their FLOPs, bytes and dependencies, recorded as they are dispatched.

    trace = KernelTrace()
    with trace.phase("forward"):
        loss = model(x)
    kernels = fuse(trace.operators, lambda operator: operator.block)

Bytes are those of the elements of the tensors that an operator reads and writes, each once: caches are not modelled.
Views and allocations launch nothing and are left out. The input of a gather counts as many bytes as its output.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

KINDS = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), "products"),
    **dict.fromkeys(("convolution", "convolution_backward"), "convolutions"),
    **dict.fromkeys(("native_layer_norm", "native_layer_norm_backward"), "norms"),
    **dict.fromkeys(("native_dropout", "native_dropout_backward"), "dropout"),
    **dict.fromkeys(("_fused_adamw_", "_foreach_norm", "_foreach_mul_", "_foreach_add_", "_foreach_sub_"), "optimizer"),
    **dict.fromkeys(("index_select", "index", "gather", "index_put", "index_put_", "scatter_add_"), "gathers"),
    **dict.fromkeys(("_to_copy", "clone", "copy_", "cat", "stack", "constant_pad_nd", "slice_backward"), "copies"),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "new_full", "ones_like", "full", "fill_", "zero_"), "copies"),
    **dict.fromkeys(("sum", "mean", "argmax", "_log_softmax", "_log_softmax_backward_data"), "reductions"),
    **dict.fromkeys(("nll_loss_forward", "nll_loss_backward", "linalg_vector_norm", "sort"), "reductions"),
}
"""kind of an operator by its name; of attention by the word in its name; all others are 'elementwise'"""
FUSABLE = ("elementwise", "copies", "dropout", "norms", "reductions")
"""kinds that a compiler fuses, besides `index_select`, unless they reduce over frames"""
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense", "numel"}
OVERWRITTEN = {"copy_", "fill_", "zero_"}
"""in-place operators that do not read what they overwrite"""
CHUNK, CHUNKS_PER_LAUNCH = 65_536, 320
"""elements per block and blocks per launch of operators on lists of tensors (multi_tensor_apply.cuh of torch)"""

Value = tuple[int, int]
"""number of a storage, and index of the operator that wrote it last (-1: before the trace)"""


@dataclass
class Access:
    """Tensor that an operator reads or writes."""

    value: Value
    place: tuple
    """offset, sizes and strides in the storage"""
    size: int
    """bytes of its distinct elements"""
    limit: int
    """bytes of the storage"""


@dataclass
class Operator:
    """Operator on the device."""

    name: str
    kind: str
    phase: str
    block: str
    """forward or backward pass of an encoder block; '' outside of the blocks"""
    reads: list[Access]
    writes: list[Access]
    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    """of the first input"""
    products: list[tuple[int, int, int, int]] = field(default_factory=list)
    """matrix products that it computes: number, rows, columns, length of the sums"""
    depthwise: bool = False
    """a convolution with one channel per group"""
    over_frames: bool = False
    """a reduction over frames, such as the gradient of a bias"""
    launches: int = 1
    extra_bytes: int = 0
    """moved by its kernels in torch, but not by fused ones"""
    copied: int = 0
    """bytes of the inputs of a depthwise convolution that are copied first: cuDNN and torch read them contiguous"""
    needs: set[int] = field(default_factory=set)
    """operators whose results it reads"""

    @property
    def fusable(self) -> bool:
        return (self.kind in FUSABLE or self.name == "index_select") and not self.over_frames


@dataclass
class Kernel:
    """One operator, or several that are fused."""

    kind: str
    operators: list[Operator]
    size: int
    """bytes read and written"""
    launches: int

    @property
    def flops(self) -> float:
        return sum(operator.flops for operator in self.operators)


class KernelTrace(TorchDispatchMode):
    """Recorder of the operators on tensors of device `cuda`."""

    def __init__(self, attention_share: float = 1.0) -> None:
        """attention_share: pairs that attention computes, among all pairs of its inputs."""
        super().__init__()
        self.operators: list[Operator] = []
        self.attention_share = attention_share
        self._phase = self._block = ""
        self._storages: dict[int, tuple[int, Any]] = {}  # the storage is kept: an address is not used again
        self._writer: dict[int, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the operators of this block of code."""
        self._phase = name
        with self:
            yield

    def mark_blocks(self, blocks: Sequence[nn.Module]) -> list[Any]:
        """Record for each operator the block that it belongs to; returns handles of hooks."""

        def enter(name: str) -> None:
            self._block = name

        def before(number: int, x: Tensor) -> None:
            enter(f"block {number} forward")
            if number == 0 and x.requires_grad:  # the gradient of a block's input is complete: the block is done
                x.register_hook(lambda _: enter(""))

        def after(number: int, y: Tensor) -> None:
            enter("")
            y.register_hook(lambda _: enter(f"block {number} backward"))

        handles: list[Any] = []
        for number, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(lambda _, args, n=number: before(n, args[0])))
            handles.append(block.register_forward_hook(lambda _, args, out, n=number: after(n, out)))
        return handles

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _on_device((args, kwargs)), _on_device(out)
        name = func._schema.name.split("::")[1]
        if name in NO_KERNEL or not (inputs or outputs):
            return out
        written = _mutated(func, args, kwargs or {})
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        if written or new:
            self._record(func, name, args, kwargs or {}, out, inputs, written, new)
        return out

    def _record(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], written: list[Tensor],
        new: list[Tensor],
    ) -> None:  # fmt: skip
        if name == "_fused_adamw_":  # it writes the gradients only to unscale them
            gradients = {id(tensor) for tensor in args[1]}
            written = [tensor for tensor in written if id(tensor) not in gradients]
        overwritten = {id(tensor) for tensor in written} if name in OVERWRITTEN else set()
        read = [tensor for tensor in inputs if id(tensor) not in overwritten]
        kind = "attention" if "attention" in name else KINDS.get(name, "elementwise")
        accesses = [self._access(tensor) for tensor in read]
        if name in ("index_select", "index", "gather"):
            accesses[0].size = min(accesses[0].size, sum(map(_bytes, new)))
        if name == "nll_loss_forward":  # it reads one number per label
            accesses[0].size = args[1].numel() * args[0].element_size()
        if name == "nll_loss_backward":  # it needs the shape only
            accesses[1].size = 0
        operator = Operator(name, kind, self._phase, self._block, accesses, [])
        operator.needs = {access.value[1] for access in accesses} - {-1}
        operator.needs |= {self._access(tensor).value[1] for tensor in written} - {-1}
        operator.dtype = next((t.dtype for t in read if t.dtype.is_floating_point), torch.float32)
        self._count_flops(operator, func, args, kwargs, out)
        if kind == "optimizer":
            operator.launches = math.ceil(sum(math.ceil(t.numel() / CHUNK) for t in args[0]) / CHUNKS_PER_LAUNCH)
        if name == "slice_backward":  # zeros, and a copy of the gradient
            operator.launches, operator.extra_bytes = 2, operator.reads[0].size
        if name in ("sum", "mean") and len(args) > 1 and args[1]:
            operator.over_frames = args[0].dim() - 1 not in {dim % args[0].dim() for dim in args[1]}
        if name == "native_layer_norm_backward" and len(new) > 1:
            # Gradients of weight and bias are sums over frames: another kernel, which reads the same tensors.
            self._add(operator, new[:1])
            of_weights = Operator(name, kind, self._phase, self._block, list(accesses[:4]), [], over_frames=True)
            of_weights.needs = set(operator.needs)
            self._add(of_weights, new[1:])
            return
        self._add(operator, [*new, *written])

    def _add(self, operator: Operator, written: list[Tensor]) -> None:
        index = len(self.operators)
        self.operators.append(operator)
        for tensor in written:
            access = self._access(tensor)
            access.value = (access.value[0], index)
            operator.writes.append(access)
        for access in operator.writes:
            self._writer[access.value[0]] = index

    def _access(self, tensor: Tensor) -> Access:
        storage = tensor.untyped_storage()
        number, _ = self._storages.setdefault(storage._cdata, (len(self._storages), storage))
        place = (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        return Access((number, self._writer.get(number, -1)), place, _bytes(tensor), storage.nbytes())

    def _count_flops(self, operator: Operator, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if operator.kind == "products":
            left, right = args[-2:] if operator.name in ("mm", "bmm") else args[1:3]
            batch = left.shape[0] if left.dim() == 3 else 1
            operator.products = [(batch, left.shape[-2], right.shape[-1], left.shape[-1])]
        elif operator.name == "convolution":
            operator.depthwise, operator.products = _convolution(args[1], out, args[8])
        elif operator.name == "convolution_backward":
            grad, _, weight, *_, groups, mask = args
            operator.depthwise, ((batch, rows, columns, sums),) = _convolution(weight, grad, groups)
            of_input, of_weight = (batch, rows, sums, columns), (batch, columns, sums, rows)
            operator.products = [of_input] * mask[0] + [of_weight] * mask[1]
            operator.launches = sum(mask[:2])
        if operator.depthwise:
            strided = [tensor for tensor in args[: operator.launches] if not tensor.is_contiguous()]
            operator.copied = sum(map(_bytes, strided))
            operator.launches += len(strided)
        operator.flops = float(sum(2 * math.prod(product) for product in operator.products))
        if operator.kind == "attention":
            counted = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            operator.flops = counted * self.attention_share
            operator.launches = 2 if "backward" in operator.name else 1


def _on_device(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.device.type == "cuda"]


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: dimensions of stride 0 repeat them."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n)
    return math.prod(sizes) * tensor.element_size()


def _mutated(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments that the operator writes."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _on_device(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


def _convolution(weight: Tensor, out: Tensor, groups: int) -> tuple[bool, list[tuple[int, int, int, int]]]:
    """Whether a convolution is depthwise, and its product: groups, output places, output channels, sums."""
    places = out.numel() // out.shape[1]
    return weight.shape[1] == 1 and groups > 1, [(groups, places, len(weight) // groups, weight[0].numel())]


# ---- Fusion ----


def fuse(operators: Sequence[Operator], region: Callable[[Operator], str]) -> list[Kernel]:
    """Kernels after fusion within each region, '' for operators that are not compiled.

    The rule: fusable operators of a region are one kernel if they are connected by results that one computes and
    another reads, without an operator between them that is not fused: a matrix product, a convolution, attention, or an
    index into the results of a norm or another reduction along a frame. A reduction over frames is fused with operators
    that read its results only. Operators without inputs of the region are computed where their results are read. A
    kernel reads every tensor from outside once, and writes those that are read outside. Inductor fuses such chains; it
    also fuses reductions over frames with their inputs, and operators that share inputs, which is not assumed here.
    """
    group_of = _groups(operators, region)
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(group_of):
        members[group].append(index)
    readers: dict[Value, set[int]] = defaultdict(set)
    for index, operator in enumerate(operators):
        for access in operator.reads:
            readers[access.value].add(group_of[index])
    kernels = []
    for group, indices in members.items():
        chosen = [operators[index] for index in indices]
        if len(chosen) == 1:
            operator = chosen[0]
            size = _distinct(operator.reads) + _distinct(operator.writes)
            compiled = region(operator) and (operator.fusable or operator.over_frames)
            size += 2 * operator.copied + (0 if compiled else operator.extra_bytes)
            launches = operator.launches
            if launches and compiled:
                launches = 1 + operator.over_frames
            kernels.append(Kernel(operator.kind, chosen, size, launches))
            continue
        inside = set(indices)
        reads = [access for operator in chosen for access in operator.reads if access.value[1] not in inside]
        writes = [access for operator in chosen for access in operator.writes if readers[access.value] - {group}]
        kind = "fused norms" if any(operator.kind == "norms" for operator in chosen) else "fused elementwise"
        sums = [operator.kind for operator in chosen if operator.over_frames]
        launches = 2 if sums else 1  # partial sums, and their sum
        kernels.append(Kernel(sums[0] if sums else kind, chosen, _distinct(reads) + _distinct(writes), launches))
    return kernels


def _groups(operators: Sequence[Operator], region: Callable[[Operator], str]) -> list[int]:
    """Group of every operator: the index of one of its members.

    The level of an operator is the largest number of boundaries on a path to it within its region. Both ends of a path
    with a boundary differ in level, so that no group waits for itself.
    """
    level, reduced = [0] * len(operators), [False] * len(operators)
    joined: list[list[int]] = []
    readers: dict[int, list[int]] = defaultdict(list)
    sources = []
    for index, operator in enumerate(operators):
        needed = [other for other in operator.needs if region(operators[other]) == region(operator) != ""]
        joined.append([other for other in needed if _joins(operators[other], operator, reduced[other])])
        level[index] = max([level[other] + (other not in joined[index]) for other in needed], default=0)
        reduced[index] = operator.kind in ("norms", "reductions") or any(
            reduced[other] for other in joined[index] if level[other] == level[index]
        )
        for other in needed:
            readers[other].append(index)
        if not needed and operator.fusable and not reduced[index]:
            sources.append(index)
    for index in sources:
        if readers[index] and all(index in joined[reader] for reader in readers[index]):
            level[index] = min(level[reader] for reader in readers[index])
    parent = list(range(len(operators)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for index, others in enumerate(joined):
        for other in others:
            if level[other] == level[index]:
                parent[root(other)] = root(index)
    return [root(index) for index in range(len(operators))]


def _joins(producer: Operator, reader: Operator, reduced: bool) -> bool:
    """Whether an operator may be in the kernel that computes its input, which holds a reduction if `reduced`."""
    if not reader.fusable or (reader.kind == "gathers" and reduced):
        return False
    same_size = math.prod(producer.writes[0].place[1]) == math.prod(reader.writes[0].place[1])
    return producer.fusable or (producer.over_frames and same_size)


def _distinct(accesses: Sequence[Access]) -> int:
    """Bytes of the tensors, each place once, and at most the bytes of each storage."""
    places: dict[Value, dict[tuple, int]] = defaultdict(dict)
    limits: dict[Value, int] = {}
    for access in accesses:
        places[access.value][access.place] = max(access.size, places[access.value].get(access.place, 0))
        limits[access.value] = access.limit
    return sum(min(sum(sizes.values()), limits[value]) for value, sizes in places.items())
