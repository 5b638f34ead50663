"""Initialisation: activations, gradients and differences between frames keep their size over 24 layers at step 0."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import StageSettings
from common.segments import Segments

LARGE = {
    "dim": 128, "num_layers": 24, "num_heads": 8, "feedforward_dim": 512, "kernel_size": 9, "subsampling_channels": 32,
    "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
"""`large-600m` at an eighth of its width"""
VARIANTS: dict[str, dict[str, object]] = {
    "layer_norm": {},
    "rms_norm": {"norm": "rms_norm", "convolution_norm": "rms_norm"},
    "batch_norm": {"convolution_norm": "batch_norm"},
    "swiglu": {"feedforward": "swiglu", "feedforward_dim": 344, "num_kv_heads": 2},
    "relative": {"position": "relative"},
    "fourier": {"position": "fourier"},
    "striding": {"subsampling": "striding", "subsampling_factor": 8},
    "stacking": {"subsampling": "stacking", "causal_convolution": True, "mask": "causal"},
    "stages": {
        "num_layers": 8, "subsampling": "striding", "subsampling_factor": 2,
        "earlier_stages": [StageSettings(8, 64, 4, 256, group_size=3), StageSettings(8, 96, 4, 384)],
    },
}  # fmt: skip


@dataclass
class Depth:
    """Statistics of a forward and a backward pass, at the input of each block and after the last."""

    activation: list[float]
    """root mean square"""
    between_frames: list[float]
    """share of the mean square of the activations that varies between frames"""
    gradient: list[float]
    """root mean square"""
    weights: dict[str, list[float]]
    """root mean square of the gradient of each weight, by name within the block"""


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean()) ** 0.5


def measure(encoder: ConformerEncoder) -> Depth:
    """Measure in training mode, on log-mel frames of unit variance, with a loss that weights all outputs equally."""
    rows, frames = 4, 240
    activations: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, object]) -> None:
        args[0].retain_grad()
        activations.append(args[0])

    for block in encoder.blocks:
        block.register_forward_pre_hook(keep)
    layout = encoder.layout(Segments(torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows, 1), frames), frames))
    outputs = encoder.train()(torch.randn(rows, frames, 80), layout)
    outputs.retain_grad()
    (outputs * torch.randn_like(outputs)).sum().backward()
    weights: dict[str, list[float]] = {}
    for block in encoder.blocks:
        for name, parameter in block.named_parameters():
            if parameter.ndim > 1 and not name.startswith(("shortcut", "attention.relative")):
                assert parameter.grad is not None
                weights.setdefault(name, []).append(rms(parameter.grad))
    activations.append(outputs)
    return Depth(
        activation=[rms(x) for x in activations],
        between_frames=[rms(x - x.mean(dim=(0, 1))) ** 2 / rms(x) ** 2 for x in activations],
        gradient=[rms(x.grad) for x in activations if x.grad is not None],
        weights=weights,
    )


def spread(values: list[float]) -> float:
    return max(values) / min(values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_gradients_and_differences_between_frames_keep_their_size_over_24_layers(variant: str) -> None:
    """Factors: 1.5 for activations and for their share between frames; 2 for their gradients, 3 for those of weights.

    With torch's default initialisation and LayerNorm in the convolution module: 9, 50, 6 and 6.
    """
    torch.manual_seed(0)
    encoder = ConformerEncoder(EncoderSettings(**{**LARGE, **VARIANTS[variant]}))  # type: ignore[arg-type]
    depth = measure(encoder)
    assert len(depth.activation) == len(depth.gradient) == 25
    assert spread(depth.activation) < 1.5 and 0.7 < depth.activation[0] < 1.3
    assert spread(depth.between_frames) < 1.5 and depth.between_frames[0] > 0.4
    assert spread(depth.gradient) < 2
    assert max(spread(sizes) for sizes in depth.weights.values()) < 3


def test_biases_start_at_zero_and_norms_at_one() -> None:
    encoder = ConformerEncoder(EncoderSettings(convolution_norm="batch_norm", num_layers=2))
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
