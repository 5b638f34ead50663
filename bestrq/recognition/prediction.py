"""Prediction networks of a transducer: from the labels so far to a vector that the joint network adds to a frame.

Each has two forms that give the same: `forward` over whole label sequences, for training, and `step`, label by label
with a state, for decoding. A state is a tuple of tensors with sequences along their first axis, so that a search can
pick, repeat and reorder hypotheses without knowing what is in it.

N sequences, U_s labels of sequence s, D width. Label 0, the blank, stands for what was before the first label.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]


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
        """`[sum (U_s + 1), D]`, the states of a sequence after one another; labels int64 `[U_s]` each."""
        return self._convolve(torch.cat([F.pad(one, (self.context, 0)).unfold(0, self.context, 1) for one in labels]))

    def start(self, num_sequences: int) -> State:
        """The state before `step` has seen the blank that begins every sequence."""
        device = self.embedding.weight.device
        return (torch.zeros(num_sequences, self.context, dtype=torch.int64, device=device),)

    def step(self, label: Tensor, state: State) -> tuple[Tensor, State]:
        """`[N, D]` after one more label each, int64 `[N]`; and the state after it."""
        last = torch.cat((state[0][:, 1:], label[:, None]), dim=1)
        return self._convolve(last), (last,)

    def _convolve(self, last: Tensor) -> Tensor:
        return self.dropout(F.relu(self.convolution(self.embedding(last).flatten(1))))


class LSTMPrediction(nn.Module):
    """All labels so far, through an LSTM. Source: Graves 2012, section 2.1."""

    def __init__(self, vocab_size: int, dim: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.lstm = nn.LSTM(dim, dim, num_layers, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, labels: Sequence[Tensor]) -> Tensor:
        """`[sum (U_s + 1), D]`, the states of a sequence after one another; labels int64 `[U_s]` each."""
        padded = nn.utils.rnn.pad_sequence([F.pad(one, (1, 0)) for one in labels], batch_first=True)
        output, _ = self._run(self.embedding(padded), None)
        return self.dropout(torch.cat([row[: len(one) + 1] for row, one in zip(output, labels, strict=True)]))

    def start(self, num_sequences: int) -> State:
        """The state before `step` has seen the blank that begins every sequence."""
        zeros = self.embedding.weight.new_zeros(num_sequences, self.lstm.num_layers, self.lstm.hidden_size)
        return zeros, zeros

    def step(self, label: Tensor, state: State) -> tuple[Tensor, State]:
        """`[N, D]` after one more label each, int64 `[N]`; and the state after it."""
        before = tuple(tensor.transpose(0, 1).contiguous() for tensor in state)
        output, after = self._run(self.embedding(label)[:, None], before)
        return self.dropout(output[:, 0]), tuple(tensor.transpose(0, 1) for tensor in after)

    def _run(self, embedded: Tensor, before: State | None) -> tuple[Tensor, State]:
        # On CUDA, autocast to bfloat16 runs cuDNN's LSTM in float16, where gradients that no scaler guards vanish.
        with torch.autocast(embedded.device.type, enabled=False):
            return self.lstm(embedded, before)
