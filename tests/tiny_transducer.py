"""Transducers small enough for a sum over all alignments, in float64."""

from typing import Any

import torch
from torch import Tensor

from bestrq.decoding.transducer_search import Transducer
from bestrq.model.conformer import EncoderSettings
from bestrq.recognition.prediction import State
from bestrq.recognition.transducer import TransducerModel, TransducerSettings

VOCAB = 5
MELS = 8


class TableTransducer:
    """Logits of a frame plus random logits for the last two labels, so that the next label depends equally on both.

    Joint width J is the vocabulary.
    """

    def __init__(self, vocab_size: int = VOCAB, blank_bias: float = 0.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.table = 1.5 * torch.randn((vocab_size,) * 3, dtype=torch.float64, generator=generator)
        self.table[..., 0] += blank_bias

    def start(self, num_sequences: int) -> State:
        return (torch.zeros(num_sequences, dtype=torch.int64),)

    def predict(self, label: Tensor, state: State) -> tuple[Tensor, State]:
        return self.table[state[0], label], (label,)

    def joint(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return (encoded + predicted).log_softmax(dim=-1)


def make_transducer(prediction: str, vocab_size: int = VOCAB, seed: int = 0, **encoder: Any) -> TransducerModel:
    """`TransducerModel` with random weights, whose joint width is the vocabulary too."""
    torch.manual_seed(seed)
    shape = EncoderSettings(
        num_mels=MELS, dim=8, num_layers=1, num_heads=2, feedforward_dim=8, kernel_size=3, subsampling_channels=2,
        **encoder,
    )  # fmt: skip
    settings = TransducerSettings(prediction=prediction, prediction_dim=5, joint_dim=vocab_size)  # type: ignore[arg-type]
    model = TransducerModel(shape, settings, vocab_size).double().eval()
    torch.nn.init.normal_(model.joint.output.weight, std=3.0)  # logits as large as those of a trained model
    torch.nn.init.zeros_(model.joint.output.bias)
    return model


def make_any(kind: str, **table: Any) -> Transducer:
    """`TableTransducer`, or a `TransducerModel` with a stateless or an LSTM prediction network."""
    return TableTransducer(**table) if kind == "table" else make_transducer(kind, table.get("vocab_size", VOCAB))


def random_frames(sequences: int, frames: int, joint_dim: int = VOCAB, seed: int = 0) -> Tensor:
    """Random projected encoder output, float64 `[N, T, J]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, frames, joint_dim, dtype=torch.float64, generator=generator) * 1.5
