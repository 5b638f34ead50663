"""Norms of gradients and activations by module, for metrics.jsonl and TensorBoard; training is not changed."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bestrq.training.meters import MetricsLog
from bestrq.training.process import World, unwrap
from bestrq.training.run_folder import NormSettings


class ModuleNorms:
    """Norms of every `every_steps`-th optimizer step, as a line of kind "norms".

    `gradient/MODULE` is the 2-norm of the gradient of a module's parameters over all ranks, before clipping; 0 if it
    has none. The squares of all modules sum to the square of `grad_norm`. `activation/MODULE` is the root mean square
    of the elements of a module's output over all rows, micro-batches and ranks, padding included; modules that are not
    called have none. Blocks that are compiled have none for their layers.

    Args:
        model: wrapped by `parallelise`.
    """

    def __init__(self, settings: NormSettings, model: nn.Module, metrics: MetricsLog, world: World) -> None:
        self._every, self._metrics, self._world = settings.every_steps, metrics, world
        self._model = unwrap(model)
        layers = settings.detail == "layers"
        self._groups = {name: module_of(name, layers) for name, _ in self._model.named_parameters()}
        self._names = list(dict.fromkeys(self._groups.values()))
        self._hooks: list[RemovableHandle] = []
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def start(self, step: int) -> None:
        """Observe the activations of this step if it has a line; called before its first forward pass."""
        if step % self._every:
            return
        self._sums = {}
        modules = dict(self._model.named_modules())
        compiled = tuple(f"{name}." for name, module in modules.items() if getattr(module, "compiled", None))
        for name in self._names:
            if name and not (compiled and name.startswith(compiled)):  # a hook would break the compiled graph
                self._hooks.append(modules[name].register_forward_hook(partial(self._observe, name)))

    @torch.no_grad()
    def _observe(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = next((value for value in _members(output) if value.is_floating_point()), None)
        if tensor is not None:
            tensor = tensor.detach()
            squares, count = self._sums.get(name, (torch.zeros((), dtype=torch.float64, device=tensor.device), 0))
            norm = torch.linalg.vector_norm(tensor, dtype=torch.float32).double()
            self._sums[name] = (squares + norm.square(), count + tensor.numel())

    @torch.no_grad()
    def write(self, step: int) -> None:
        """Write the line of this step, if it has one. All ranks must call it before gradients are clipped."""
        if step % self._every:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        zero = torch.zeros((), dtype=torch.float64, device=self._world.device)
        squares = dict.fromkeys(self._names, zero)
        for name, parameter in self._model.named_parameters():
            group = self._groups[name]
            squares[group] = squares[group] + own_square(parameter.grad, self._world)
        activations = [self._sums.get(name, (zero, 0)) for name in self._names]
        counts = torch.tensor([count for _, count in activations], dtype=torch.float64).to(self._world.device)
        stacked = [torch.stack(list(squares.values())), torch.stack([total for total, _ in activations]), counts]
        gradient, activation, count = self._world.sum(torch.stack(stacked)).tolist()
        values = {f"gradient/{name}": math.sqrt(total) for name, total in zip(self._names, gradient, strict=True)}
        for name, total, elements in zip(self._names, activation, count, strict=True):
            if elements:
                values[f"activation/{name}"] = math.sqrt(total / elements)
        self._metrics.write(step, values, kind="norms")
        self._sums = {}


def module_of(parameter: str, layers: bool) -> str:
    """Name of the module that a parameter is counted with: a block or another part of the encoder, a head.

    Args:
        layers: one level deeper, such as the attention of a block.
    """
    path = parameter.split(".")[:-1]
    depth = 1 if path[:1] != ["encoder"] else 3 if path[1:2] == ["blocks"] else 2
    return ".".join(path[: depth + layers])


def own_square(gradient: Any, world: World) -> Tensor:
    """This rank's share of the squared 2-norm of a gradient, float64: the sum over ranks is the square of the whole.

    Gradients are replicated (DDP), sharded (FSDP2), or sharded within groups of ranks that are replicas.
    """
    if gradient is None:
        return torch.zeros((), dtype=torch.float64, device=world.device)
    replicas = world.size
    if hasattr(gradient, "device_mesh"):
        sizes = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
        replicas = math.prod(size for size, placement in sizes if placement.is_replicate())
        gradient = gradient.to_local()
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square() / replicas


def _members(output: Any) -> list[Tensor]:
    """Tensors of an output: itself, or the members of a tuple."""
    members = output if isinstance(output, (tuple, list)) else [output]
    return [member for member in members if isinstance(member, Tensor)]
