"""Decoding of an audio file to a single tensor."""

import os
from typing import BinaryIO

import torch
from torch import Tensor

from data.audio.reading import audio_blocks
from data.features import FeatureSettings


def read_audio(source: str | os.PathLike[str] | BinaryIO, settings: FeatureSettings, name: str | None = None) -> Tensor:
    """Concatenated `audio_blocks`: float32 [samples] at settings.sample_rate."""
    return torch.cat(list(audio_blocks(source, settings, name)))
