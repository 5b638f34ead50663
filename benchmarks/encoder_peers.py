"""Other systems of benchmarks.encoder_speed: widely used Conformer encoders, on padded batches.

All are classes of their packages with the settings of our preset: width, layers, heads, feed-forward width, kernel,
SiLU, and the same dropout in all modules that have one, attention weights included. Layer drop is off. Remaining
differences: batch norm in the convolution module of torchaudio, Wav2Vec2-Conformer and Parakeet (SpeechBrain and
bestrq: layer norm), and the projection of relative positions in every block of SpeechBrain, relative
Wav2Vec2-Conformer and Parakeet. The attention implementation is their default.

The packages (requirements-benchmarks.txt) are imported only if a system is selected.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from benchmarks.encoder_batches import Batch
from bestrq.model.settings import EncoderSettings


@dataclass(frozen=True)
class Encoder:
    """Encoder under test."""

    model: nn.Module
    forward: Callable[[Batch], Tensor]
    """outputs `[B, T, D]`; those at padding frames are unused"""


def require(name: str) -> ModuleType:
    """Import the package of a system; exit with the command that installs it if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise SystemExit(
            f"{package} is not installed: pip install -r requirements-benchmarks.txt, or remove it from --systems"
        ) from error


def inside(batch: Batch) -> Tensor:
    """Bool `[B, T]`, False at the padding frames of a padded batch."""
    return torch.arange(batch.x.shape[1]) < batch.length


def make_torchaudio(settings: EncoderSettings, dropout: float) -> Encoder:
    """torchaudio.models.Conformer: no positions, attention of `torch.nn.MultiheadAttention`."""
    model = require("torchaudio.models").Conformer(
        input_dim=settings.dim,
        num_heads=settings.num_heads,
        ffn_dim=settings.feedforward_dim,
        num_layers=settings.num_layers,
        depthwise_conv_kernel_size=settings.kernel_size,
        dropout=dropout,
    )
    return Encoder(model, lambda batch: model(batch.x, batch.length[:, 0])[0])


def make_speechbrain(settings: EncoderSettings, dropout: float) -> Encoder:
    """SpeechBrain's ConformerEncoder with RelPosMHAXL as in its recipes, called as in its TransformerASR."""
    conformer = require("speechbrain.lobes.models.transformer.Conformer")
    encoder = conformer.ConformerEncoder(
        num_layers=settings.num_layers,
        d_model=settings.dim,
        d_ffn=settings.feedforward_dim,
        nhead=settings.num_heads,
        kernel_size=settings.kernel_size,
        activation=nn.SiLU,
        dropout=dropout,
        attention_type="RelPosMHAXL",
    )
    positions = require("speechbrain.nnet.attention").RelPosEncXL(settings.dim)

    def forward(batch: Batch) -> Tensor:
        return encoder(batch.x, src_key_padding_mask=~inside(batch), pos_embs=positions(batch.x))[0]

    return Encoder(nn.ModuleList((encoder, positions)), forward)


def make_wav2vec2(settings: EncoderSettings, dropout: float, positions: str) -> Encoder:
    """Encoder of transformers' Wav2Vec2ConformerModel, with 'rotary' or 'relative' positions."""
    transformers = require("transformers")
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=settings.dim,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=settings.feedforward_dim,
        hidden_act="silu",
        hidden_dropout=dropout,
        activation_dropout=dropout,
        attention_dropout=dropout,
        conformer_conv_dropout=dropout,
        layerdrop=0.0,
        position_embeddings_type=positions,
        conv_depthwise_kernel_size=settings.kernel_size,
    )
    encoder = transformers.Wav2Vec2ConformerModel(config).encoder
    encoder.pos_conv_embed = None  # unused by the forward pass

    def forward(batch: Batch) -> Tensor:
        # The encoder zeroes the padding of its input in place, so it gets a copy.
        return encoder(batch.x.clone(), attention_mask=inside(batch)).last_hidden_state

    return Encoder(encoder, forward)


class _NoSubsampling(nn.Module):
    """Replacement of a front end, for input in encoder frames."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x


def make_parakeet(settings: EncoderSettings, dropout: float, front_end: bool) -> Encoder:
    """transformers' ParakeetEncoder (FastConformer): its blocks alone, or with its striding subsampling."""
    transformers = require("transformers")
    config = transformers.ParakeetEncoderConfig(
        hidden_size=settings.dim,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=settings.feedforward_dim,
        conv_kernel_size=settings.kernel_size,
        subsampling_factor=8 if front_end else 1,
        num_mel_bins=settings.num_mels,
        dropout=dropout,
        activation_dropout=dropout,
        attention_dropout=dropout,
        layerdrop=0.0,
    )
    encoder = transformers.ParakeetEncoder(config)
    if not front_end:
        encoder.subsampling = _NoSubsampling()

    def forward(batch: Batch) -> Tensor:
        return encoder(batch.x, attention_mask=inside(batch)).last_hidden_state

    return Encoder(encoder, forward)


PEERS: dict[str, Callable[[EncoderSettings, float], Encoder]] = {
    "torchaudio": make_torchaudio,
    "speechbrain": make_speechbrain,
    "wav2vec2_rotary": lambda settings, dropout: make_wav2vec2(settings, dropout, "rotary"),
    "wav2vec2_relative": lambda settings, dropout: make_wav2vec2(settings, dropout, "relative"),
    "parakeet": lambda settings, dropout: make_parakeet(settings, dropout, front_end=False),
}
"""name -> function that makes the blocks of that system"""
