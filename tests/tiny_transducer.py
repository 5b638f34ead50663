"""Float64 transducers that are small enough to enumerate all alignments."""

from typing import Any

import torch
from torch import Tensor

from bestrq.decoding.transducer_search import PredictionState, Transducer
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.transducer import TransducerModel, TransducerSettings

VOCAB = 5
MELS = 8


class TableTransducer:
    """Transducer whose logits are the encoder output plus a random table entry for the last two labels.

    The joint width J is the vocabulary size.
    """

    def __init__(self, vocab_size: int = VOCAB, blank_bias: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.table = 1.5 * torch.randn((vocab_size,) * 3, dtype=torch.float64, generator=generator)
        self.table[..., 0] += blank_bias

    def start(self, num_sequences: int) -> PredictionState:
        return (torch.zeros(num_sequences, dtype=torch.int64),)

    def predict(self, label: Tensor, state: PredictionState) -> tuple[Tensor, PredictionState]:
        return self.table[state[0], label], (label,)

    def joint(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return (encoded + predicted).log_softmax(dim=-1)


def make_transducer(prediction: str, vocab_size: int = VOCAB, seed: int = 0, **encoder: Any) -> TransducerModel:
    """`TransducerModel` with random weights, whose joint width is the vocabulary size."""
    torch.manual_seed(seed)
    shape = EncoderSettings(
        num_mels=MELS, dim=8, num_layers=1, num_heads=2, feedforward_dim=8, kernel_size=3, subsampling_channels=2,
        **encoder,
    )  # fmt: skip
    settings = TransducerSettings(prediction=prediction, prediction_dim=5, joint_dim=vocab_size)  # type: ignore[arg-type]
    model = TransducerModel(shape, settings, vocab_size).double().eval()
    torch.nn.init.normal_(model.joint.output.weight, std=3.0)  # as confident as a trained model
    torch.nn.init.zeros_(model.joint.output.bias)
    return model


def make_any(kind: str, **table: Any) -> Transducer:
    """Make a `TableTransducer`, or a model with a stateless or LSTM prediction network."""
    return TableTransducer(**table) if kind == "table" else make_transducer(kind, table.get("vocab_size", VOCAB))


def random_frames(sequences: int, frames: int, joint_dim: int = VOCAB, seed: int = 0) -> Tensor:
    """Random projected encoder outputs, float64 `[N, T, J]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, frames, joint_dim, dtype=torch.float64, generator=generator) * 1.5
