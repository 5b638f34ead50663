"""Transducer (RNN-T) on packed rows: encoder, prediction network, joint network, and an optional CTC head.

Every segment of a row is a separate utterance. The loss never holds the joint network's outputs for a complete lattice
(see `losses.transducer`).

Shapes: R rows, F mel frames per row, M mel bins, T encoder frames per row, D encoder width, J joint width, V
vocabulary, N segments of the batch, T_s encoder frames and U_s labels of segment s. Label 0 is the blank.

Source: Graves 2012, "Sequence Transduction with Recurrent Neural Networks", arXiv 1211.3711.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from bestrq.decoding.tdt_search import check_durations, tdt_greedy
from bestrq.decoding.transducer_search import GreedyState, PredictionState, greedy_search
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.recognition.ctc import ctc_loss, frame_log_probs, segment_frames
from bestrq.recognition.losses.lattices import Lattices, check_labels
from bestrq.recognition.losses.pruning import SimpleJoint
from bestrq.recognition.losses.tdt import tdt_loss
from bestrq.recognition.losses.transducer import frames_per_slice, transducer_loss
from bestrq.recognition.prediction import LSTMPrediction, StatelessPrediction
from common.errors import UserError
from common.segments import Segments, to_device


@dataclass(frozen=True)
class TransducerSettings:
    """Prediction network, joint network and loss of a transducer."""

    prediction: Literal["stateless", "lstm"] = "stateless"
    """prediction network: the last `context` labels, embedded and convolved; or all labels, through an LSTM"""
    context: PositiveInt = 2
    """labels that a stateless prediction network depends on"""
    prediction_dim: PositiveInt = 512
    """width of the prediction network"""
    prediction_layers: PositiveInt = 1
    """LSTM layers"""
    joint_dim: PositiveInt = 512
    """width of the joint network"""
    dropout: float = 0.1
    """dropout probability on the output of the prediction network"""
    ctc_weight: NonNegativeFloat = 0.0
    """weight of the CTC loss of a linear head on the encoder, which can be used for decoding too; 0: no CTC head"""
    fast_emit: NonNegativeFloat = 0.0
    """FastEmit: relative increase of the gradients of labels, for earlier emission; typically 0.005"""
    durations: list[int] = field(default_factory=list)
    """token-and-duration transducer: durations of a token in frames, each with its own output, such as
    [0, 1, 2, 3, 4]; empty: plain transducer"""
    sigma: NonNegativeFloat = 0.05
    """with durations: nats subtracted from every token's log-probability in training, which favours long durations"""
    prune_range: int = 0
    """pruned transducer: states (numbers of emitted labels) per frame for which the joint network is computed, chosen
    by a joint network without a hidden layer; 0: all states"""
    simple_weight: NonNegativeFloat = 0.5
    """with prune_range: weight of the loss of the joint network without a hidden layer"""
    slice_bytes: PositiveInt = 256 * 2**20
    """memory for the joint network's outputs, which are computed in slices"""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise UserError(f"transducer.dropout is {self.dropout}: give 0 or more, and less than 1")
        if self.durations:
            check_durations(self.durations)
            if self.fast_emit:
                raise UserError(
                    f"transducer.fast_emit is {self.fast_emit}: give 0 with durations; FastEmit applies to the plain "
                    "transducer only"
                )
        if self.prune_range < 0 or self.prune_range == 1:
            raise UserError(f"transducer.prune_range is {self.prune_range}: give 2 or more, or 0 for all states")


def check_slice_bytes(settings: TransducerSettings, vocab_size: int, most_labels: int, itemsize: int) -> None:
    """Raise UserError, with the smallest sufficient value, if `slice_bytes` is too small for one frame of a segment of
    `most_labels` labels.

    Args:
        itemsize: bytes of a number in the matrix products, 2 or 4.
    """
    # One frame, without a band: with few frames, pruning keeps more than prune_range states per frame, up to all.
    lattices = Lattices([1], [torch.zeros(most_labels, dtype=torch.int64)])
    num_outputs = vocab_size + len(settings.durations)
    frames_per_slice(lattices, settings.joint_dim, num_outputs, itemsize, settings.slice_bytes)


@dataclass
class TransducerOutput:
    """Sums over the segments of a batch, in nats; the training step divides by the labels of all ranks and
    micro-batches."""

    loss_sum: Tensor
    """float32 scalar (float64 for a float64 model): weighted sum of all losses, to be minimised"""
    transducer_sum: Tensor
    """transducer loss, detached"""
    ctc_sum: Tensor
    """loss of the CTC head, detached; 0 without CTC head"""


class Joint(nn.Module):
    """Joint network: projections of encoder and prediction network, their sum, tanh, and a linear layer with V token
    outputs and one output per duration."""

    def __init__(
        self, encoder_dim: int, prediction_dim: int, joint_dim: int, vocab_size: int, num_durations: int
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.encoder_projection = nn.Linear(encoder_dim, joint_dim)
        self.prediction_projection = nn.Linear(prediction_dim, joint_dim, bias=False)
        self.output = nn.Linear(joint_dim, vocab_size + num_durations)

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Log-probabilities of tokens and durations, each with its own softmax, `[..., V + num_durations]`, at
        least float32.

        Args:
            encoded, predicted: projected frames and states `[..., J]`, which are broadcast.
        """
        logits = self.output(torch.tanh(encoded + predicted))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        parts = logits.split((self.vocab_size, logits.shape[-1] - self.vocab_size), dim=-1)
        log_probs = [part.log_softmax(dim=-1) for part in parts if part.shape[-1]]
        return log_probs[0] if len(log_probs) == 1 else torch.cat(log_probs, dim=-1)


class TransducerModel(nn.Module):
    """`ConformerEncoder`, prediction network and joint network."""

    inference_methods = ("encode", "greedy")
    """methods besides `forward` for which FSDP2 gathers weights, those of validation"""

    def __init__(self, encoder: EncoderSettings, settings: TransducerSettings, vocab_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.vocab_size = vocab_size
        self.encoder = ConformerEncoder(encoder)
        dim, dropout = settings.prediction_dim, settings.dropout
        self.prediction: LSTMPrediction | StatelessPrediction
        if settings.prediction == "lstm":
            self.prediction = LSTMPrediction(vocab_size, dim, settings.prediction_layers, dropout)
        else:
            self.prediction = StatelessPrediction(vocab_size, dim, settings.context, dropout)
        self.joint = Joint(encoder.dim, dim, settings.joint_dim, vocab_size, len(settings.durations))
        self.simple_joint = SimpleJoint(encoder.dim, dim, vocab_size) if settings.prune_range else None
        self.ctc_head = nn.Linear(encoder.dim, vocab_size) if settings.ctc_weight else None

    def encode(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Encoder side of the joint network at every frame of every row, `[R, T, J]`."""
        return self.joint.encoder_projection(self._hidden(log_mel, segments))

    def ctc_log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Log-probabilities of the CTC head at every frame of every row, float32 (or float64) `[R, T, V]`.

        Raises:
            UserError: the model has no CTC head.
        """
        if self.ctc_head is None:
            raise UserError(
                "decoder.head is 'ctc', but the transducer was trained with transducer.ctc_weight 0 and has no CTC "
                "head: give 'rnnt'"
            )
        return frame_log_probs(self.ctc_head, self._hidden(log_mel, segments))

    def start(self, num_sequences: int) -> PredictionState:
        """State of the prediction network before the first `predict`, whose label is the blank."""
        return self.prediction.start(num_sequences)

    def predict(self, label: Tensor, state: PredictionState) -> tuple[Tensor, PredictionState]:
        """Prediction side of the joint network `[N, J]` after one more label per sequence, int64 `[N]`, and the new
        state."""
        predicted, state = self.prediction.step(label, state)
        return self.joint.prediction_projection(predicted), state

    def greedy(self, encoded: Tensor, lengths: Tensor, max_symbols: int) -> GreedyState:
        """`greedy_search` or `tdt_greedy` with this model; a method, so that FSDP2 gathers the weights once per
        search."""
        if self.settings.durations:
            return tdt_greedy(self, encoded, lengths, self.settings.durations, max_symbols)
        return greedy_search(self, encoded, lengths, max_symbols)

    def _hidden(
        self, log_mel: Tensor, segments: Segments, frozen_blocks: int | None = None, masked: Tensor | None = None
    ) -> Tensor:
        return self.encoder(log_mel, self.encoder.layout(segments), frozen_blocks, masked)

    def forward(
        self,
        log_mel: Tensor,
        segments: Segments,
        labels: Tensor,
        label_lengths: Tensor,
        *,
        frozen_blocks: int | None = None,
        masked: Tensor | None = None,
    ) -> TransducerOutput:
        """Loss of N segments, each over its own frames and labels only.

        Args:
            log_mel: normalised features, float32 `[R, F, M]`.
            segments: in mel frames.
            labels: int64 `[N, U]` on the CPU, of the used segments, ordered by row, then slot; values beyond a length
                are ignored.
            label_lengths: int64 `[N]` on the CPU; 0 for a segment without speech.
            frozen_blocks, masked: see `CTCModel.forward`.

        Raises:
            UserError: a label is outside the vocabulary, or `slice_bytes` is too small for one frame of a segment.
        """
        check_labels(labels, label_lengths, self.vocab_size)
        hidden = self._hidden(log_mel, segments, frozen_blocks, masked)
        settings, device, stride = self.settings, hidden.device, self.encoder.settings.stride
        index, lengths = segment_frames(segments, stride, hidden.shape[1])
        used = torch.arange(index.shape[1]) < lengths[:, None]
        frames = hidden.flatten(0, 1).index_select(0, to_device(index[used], device))  # [sum T_s, D]
        sequences = [
            row[:n] for row, n in zip(to_device(labels, device), label_lengths.tolist(), strict=True)
        ]  # one transfer
        # A batch without segments runs an empty sequence and drops its output: the graph is kept, which DDP needs.
        predicted = self.prediction(sequences or [index.new_zeros(0, device=device)])
        predicted = predicted[: sum(len(sequence) + 1 for sequence in sequences)]
        lattices = Lattices(lengths.tolist(), sequences)

        loss_sum = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if self.simple_joint is not None:
            simple_losses, lattices = self.simple_joint(frames, predicted, lattices, settings.prune_range)
            loss_sum = loss_sum + settings.simple_weight * simple_losses.sum()
        encoded, predicted = self.joint.encoder_projection(frames), self.joint.prediction_projection(predicted)
        # Autocast does not apply inside the custom autograd function of the losses, so dtypes are made equal here.
        weight, bias = self.joint.output.weight.to(encoded.dtype), self.joint.output.bias.to(encoded.dtype)
        joint = (encoded, predicted, weight, bias, lattices)
        if settings.durations:
            losses = tdt_loss(*joint, settings.durations, settings.slice_bytes, settings.sigma)
        else:
            losses = transducer_loss(*joint, settings.slice_bytes, settings.fast_emit)
        transducer_sum = losses.sum()
        loss_sum = loss_sum + transducer_sum
        ctc_sum = torch.zeros_like(loss_sum)
        if self.ctc_head is not None:
            log_probs = frame_log_probs(self.ctc_head, hidden)
            ctc_sum = ctc_loss(log_probs, segments, stride, labels, label_lengths).loss_sum
            loss_sum = loss_sum + settings.ctc_weight * ctc_sum
        return TransducerOutput(loss_sum, transducer_sum.detach(), ctc_sum.detach())
