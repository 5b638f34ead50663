"""Prediction networks of a transducer: map the labels so far to a vector for the joint network.

Each network has two equivalent forms: `forward` over complete label sequences, for training, and `step`, one label at a
time with a state, for decoding.

Shapes: N sequences, U_s labels of sequence s, D width. Label 0, the blank, precedes the first label of every sequence.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.decoding.transducer_search import PredictionState


class StatelessPrediction(nn.Module):
    """The last `context` labels, embedded and convolved.

    Source: Ghodsi et al., "RNN-Transducer with Stateless Prediction Network", ICASSP 2020.
    """

    def __init__(self, vocab_size: int, dim: int, context: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocab_size, dim)
        self.convolution = nn.Linear(context * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, labels: Sequence[Tensor]) -> Tensor:
        """Outputs `[sum (U_s + 1), D]`, concatenated over the sequences; labels are int64 `[U_s]` each."""
        contexts = [F.pad(sequence, (self.context, 0)).unfold(0, self.context, 1) for sequence in labels]
        return self._convolve(torch.cat(contexts))

    def start(self, num_sequences: int) -> PredictionState:
        """State before the first `step`, whose label is the blank."""
        device = self.embedding.weight.device
        return (torch.zeros(num_sequences, self.context, dtype=torch.int64, device=device),)

    def step(self, label: Tensor, state: PredictionState) -> tuple[Tensor, PredictionState]:
        """Output `[N, D]` after one more label per sequence, int64 `[N]`, and the new state."""
        context = torch.cat((state[0][:, 1:], label[:, None]), dim=1)
        return self._convolve(context), (context,)

    def _convolve(self, context: Tensor) -> Tensor:
        return self.dropout(F.relu(self.convolution(self.embedding(context).flatten(1))))


class LSTMPrediction(nn.Module):
    """All labels so far, through an LSTM. Source: Graves 2012, section 2.1."""

    def __init__(self, vocab_size: int, dim: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.lstm = nn.LSTM(dim, dim, num_layers, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, labels: Sequence[Tensor]) -> Tensor:
        """Outputs `[sum (U_s + 1), D]`, concatenated over the sequences; labels are int64 `[U_s]` each."""
        padded = nn.utils.rnn.pad_sequence([F.pad(sequence, (1, 0)) for sequence in labels], batch_first=True)
        output, _ = self._run(self.embedding(padded), None)
        used = [row[: len(sequence) + 1] for row, sequence in zip(output, labels, strict=True)]
        return self.dropout(torch.cat(used))

    def start(self, num_sequences: int) -> PredictionState:
        """State before the first `step`, whose label is the blank."""
        zeros = self.embedding.weight.new_zeros(num_sequences, self.lstm.num_layers, self.lstm.hidden_size)
        return zeros, zeros

    def step(self, label: Tensor, state: PredictionState) -> tuple[Tensor, PredictionState]:
        """Output `[N, D]` after one more label per sequence, int64 `[N]`, and the new state."""
        lstm_state = tuple(tensor.transpose(0, 1).contiguous() for tensor in state)
        output, lstm_state = self._run(self.embedding(label)[:, None], lstm_state)
        return self.dropout(output[:, 0]), tuple(tensor.transpose(0, 1) for tensor in lstm_state)

    def _run(self, embedded: Tensor, state: PredictionState | None) -> tuple[Tensor, PredictionState]:
        # On CUDA, autocast to bfloat16 runs cuDNN's LSTM in float16, whose gradients underflow without a loss scaler.
        with torch.autocast(embedded.device.type, enabled=False):
            return self.lstm(embedded, state)
