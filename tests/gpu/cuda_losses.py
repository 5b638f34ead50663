"""Triton's losses on the simulated GPU: their transfers as on a GPU, their values by the references on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bestrq.recognition.losses import ctc, ctc_kernels, kernels, tdt, transducer
from bestrq.recognition.losses.lattices import Lattices
from common.segments import to_device


class _OnCpu(torch.autograd.Function):
    """A function of CPU tensors, applied to the values of a tensor on the simulated device, as one kernel in each
    direction. Gradients flow to the tensor."""

    @staticmethod
    def forward(ctx: Any, on_device: Any, function: Callable[[Tensor], Tensor]) -> Any:
        with torch.enable_grad():
            ctx.leaf = on_device.content.detach().requires_grad_()
            ctx.losses = function(ctx.leaf)
        ctx.gpu = on_device.gpu
        ctx.gpu.kernels += 1
        return ctx.gpu.wrap(ctx.losses.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None]:
        [grad] = torch.autograd.grad(ctx.losses, ctx.leaf, grads[0].content, retain_graph=True)
        ctx.gpu.kernels += 1
        return ctx.gpu.wrap(grad), None


def _transducer_losses(
    arcs: Any, lattices: Lattices, durations: tuple[int, ...] | None = None, sigma: float = 0.0
) -> Any:
    """`kernels.Alignments.apply`."""
    kernels._layout(lattices, arcs.device)
    bands: Any = lattices.first_state
    labels: Any = lattices.labels
    on_cpu = replace(
        lattices, labels=[sequence.content for sequence in labels],
        first_state=None if bands is None else [first.content for first in bands],
    )  # fmt: skip
    if durations is None:
        return _OnCpu.apply(arcs, partial(transducer.sum_over_alignments, lattices=on_cpu))
    return _OnCpu.apply(arcs, partial(tdt.sum_over_durations, lattices=on_cpu, durations=durations, sigma=sigma))


def _ctc_losses(log_probs: Any, *segments: Tensor) -> Any:
    """`ctc_kernels.CTCAlignments.apply`."""
    to_device(ctc_kernels.make_plan(*segments), log_probs.device)
    return _OnCpu.apply(log_probs, lambda values: ctc.ctc_losses(values, *segments))


REPLACEMENTS: list[tuple[Any, str, Any]] = [
    (kernels, "Alignments", SimpleNamespace(apply=_transducer_losses)),
    (ctc_kernels, "CTCAlignments", SimpleNamespace(apply=_ctc_losses)),
    *((module, "use_kernels", lambda log_probs: log_probs.is_cuda) for module in (transducer, tdt, ctc)),
]
"""module, name, replacement"""
