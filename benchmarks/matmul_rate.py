"""Rate of plain matrix products in the shapes of a Conformer, the reference for the FLOPs of a model."""

import statistics
import time

import torch

from bestrq.model.settings import EncoderSettings


def matmul_rate(settings: EncoderSettings, frames: int, dtype: torch.dtype) -> float:
    """FLOP/s of the forward, input-gradient and weight-gradient products of the linear maps of a block."""
    dim, hidden = settings.dim, settings.feedforward_dim
    flops = seconds = 0.0
    for inputs, outputs in ((dim, hidden), (hidden, dim), (dim, 3 * dim), (dim, dim), (dim, 2 * dim)):
        x, w, g = (torch.randn(shape).to(dtype) for shape in ((frames, inputs), (outputs, inputs), (frames, outputs)))
        for product in (lambda: x @ w.T, lambda: g @ w, lambda: g.T @ x):  # noqa: B023
            product()
            times = []
            for _ in range(5):
                start = time.perf_counter()
                product()
                times.append(time.perf_counter() - start)
            seconds += statistics.median(times)
            flops += 2 * frames * inputs * outputs
    return flops / seconds
