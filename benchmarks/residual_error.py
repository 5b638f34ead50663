"""Error of the residual stream in float32 or bfloat16 (`encoder.residual`), against float64.

    python -m benchmarks.residual_error

Outputs and gradients of encoders of 6 to 24 blocks, with random weights, under autocast to bfloat16 on the CPU, as
relative norms of the differences. The last line is JSON: `output_error_LAYERS_PRECISION`, `gradient_error_...`, means
over two seeds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.machine import print_figures
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.settings import EncoderSettings
from common.segments import Segments

SETTINGS = EncoderSettings(
    dim=128, num_heads=4, feedforward_dim=384, kernel_size=15, subsampling_channels=16, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
SEGMENTS = Segments(torch.tensor([[0, 404]] * 2), torch.tensor([[400, 390]] * 2), 800)
Precision = Literal["float32", "bfloat16"]


def outputs_and_gradients(encoder: ConformerEncoder, log_mel: Tensor, precision: Precision | None) -> list[Tensor]:
    """Output and the gradients of all parameters, float64; `precision` None computes in float64."""
    settings = encoder.settings if precision is None else replace(encoder.settings, residual=precision)
    dtype = torch.float64 if precision is None else torch.float32
    copied = ConformerEncoder(settings)
    copied.load_state_dict(encoder.state_dict())
    copied.to(dtype).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        output = copied(log_mel.to(dtype), copied.layout(SEGMENTS)).double()
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (output * weight).sum().backward()
    grads = [parameter.grad.double().flatten() for parameter in copied.parameters() if parameter.grad is not None]
    return [output.detach(), torch.cat(grads)]


def errors(layers: int, precision: Precision, seed: int) -> list[float]:
    """Relative errors of output and gradients."""
    torch.manual_seed(seed)
    encoder, log_mel = ConformerEncoder(replace(SETTINGS, num_layers=layers)), torch.randn(2, 800, 80)
    exact = outputs_and_gradients(encoder, log_mel, None)
    rounded = outputs_and_gradients(encoder, log_mel, precision)
    return [float((ours - truth).norm() / truth.norm()) for ours, truth in zip(rounded, exact, strict=True)]


def main() -> None:
    figures = {}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for layers in (6, 12, 24):
        for precision in precisions:
            found = torch.tensor([errors(layers, precision, seed) for seed in (0, 1)]).mean(dim=0).tolist()
            print(f"{layers} blocks, {precision}: output {100 * found[0]:.2f} %, gradients {100 * found[1]:.2f} %")
            for name, value in zip(("output", "gradient"), found, strict=True):
                figures[f"{name}_error_{layers}_{precision}"] = round(value, 4)
    print_figures(figures, "bfloat16")


if __name__ == "__main__":
    main()
