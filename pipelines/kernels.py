"""Kernels compiled for training: check of the compiler, compilation of the encoder's blocks."""

import os
import shutil

import torch

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.training.machine import check_compiler, missing_compiler
from common.errors import UserError


def check_kernels(encoder: EncoderSettings, device: torch.device | str, training: bool = True) -> None:
    """Raise UserError if the encoder needs compiled kernels on this device and they cannot be built."""
    device = torch.device(device)
    if encoder.backend == "flex":
        check_compiler(device, "encoder.backend is 'flex'")
    if encoder.compile is not True or not training:
        return
    if encoder.convolution_norm == "batch_norm":
        raise UserError(
            "encoder.compile is true, but the collectives of convolution_norm 'batch_norm' are not compiled: give "
            "'auto', or another norm"
        )
    check_compiler(device, "encoder.compile is true")
    if device.type == "cpu" and shutil.which(compiler := os.environ.get("CXX", "g++")) is None:
        raise UserError(
            f"encoder.compile is true, but there is no C++ compiler {compiler!r}: install one (apt install g++), let "
            "CXX name one, or give 'auto'"
        )


def compiles(encoder: EncoderSettings, device: torch.device) -> bool:
    """Whether blocks are compiled for training on this device: `EncoderSettings.compile`."""
    if encoder.compile != "auto":
        return encoder.compile
    return device.type == "cuda" and encoder.convolution_norm != "batch_norm" and not missing_compiler()


def compile_encoder(encoder: ConformerEncoder, device: torch.device) -> None:
    """Compile the blocks of an encoder for training if its settings say so."""
    if compiles(encoder.settings, device):
        from bestrq.model.compilation import compile_blocks  # Dynamo is slow to import

        compile_blocks(encoder.blocks, encoder.settings.activation_checkpointing)
