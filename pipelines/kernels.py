"""Check of the compiler before kernels are compiled."""

import torch

from bestrq.model.conformer import EncoderSettings
from bestrq.training.machine import check_compiler


def check_kernels(encoder: EncoderSettings, device: torch.device | str) -> None:
    """Raise UserError if the encoder needs compiled kernels on this device and they cannot be built."""
    if encoder.backend == "flex":
        check_compiler(torch.device(device), "encoder.backend is 'flex'")
