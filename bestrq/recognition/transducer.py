"""A transducer (RNN-T) over packed rows: encoder, prediction network, joint network, and a CTC head beside if asked.

Every segment of a row is an utterance of its own. The loss never holds the joint network's outputs of a whole lattice:
see `transducer_loss`.

R rows, F mel frames in a row, M mel bins, T encoder frames in a row, D model width, J joint width, V vocabulary, S
segment slots in a row, N segments of the whole batch, U label length. Label 0 is the blank.

Graves 2012, "Sequence Transduction with Recurrent Neural Networks", arXiv 1211.3711.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bestrq.decoding.tdt_search import TDTState, tdt_greedy
from bestrq.decoding.transducer_search import GreedyState, greedy_search
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.recognition.ctc import ctc_loss, frame_log_probs, segment_frames
from bestrq.recognition.losses.lattices import Lattices, check_labels
from bestrq.recognition.losses.pruning import SimpleJoint
from bestrq.recognition.losses.tdt import check_durations, tdt_loss
from bestrq.recognition.losses.transducer import frames_of_slice, transducer_loss
from bestrq.recognition.prediction import LSTMPrediction, State, StatelessPrediction
from common.errors import UserError
from common.segments import Segments


@dataclass(frozen=True)
class TransducerSettings:
    """What stands on the encoder, and its loss."""

    prediction: Literal["stateless", "lstm"] = "stateless"
    """prediction network: the last `context` labels, embedded and convolved; or all of them, through an LSTM"""
    context: int = 2
    """labels that a stateless prediction network sees"""
    prediction_dim: int = 512
    """width of the prediction network"""
    prediction_layers: int = 1
    """layers of an LSTM"""
    joint_dim: int = 512
    """width of the joint network"""
    dropout: float = 0.1
    """on what the prediction network gives"""
    ctc_weight: float = 0.0
    """weight of the CTC loss of a linear head on the encoder, with which the model can decode too; 0: no such head"""
    fast_emit: float = 0.0
    """share by which gradients of labels are made larger, so that they are emitted earlier; around 0.005"""
    durations: list[int] = field(default_factory=list)
    """frames that an output may take, each with an output of its own (token-and-duration transducer), such as
    [0, 1, 2, 3, 4]; empty: the plain transducer"""
    sigma: float = 0.05
    """with durations: taken from the log-probability of every token in training, so that longer durations pay"""
    prune_range: int = 0
    """states (labels so far) that the joint network sees at a frame, chosen by a joint network without a hidden
    layer; 0: all of them"""
    simple_weight: float = 0.5
    """weight of that small network's own loss"""
    slice_bytes: int = 256 * 2**20
    """memory in which slices of the joint network are computed"""

    def __post_init__(self) -> None:
        for name in ("context", "prediction_dim", "prediction_layers", "joint_dim", "slice_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"transducer.{name} is {getattr(self, name)}: give 1 or more")
        for name in ("ctc_weight", "fast_emit", "simple_weight", "sigma"):
            if getattr(self, name) < 0:
                raise UserError(f"transducer.{name} is {getattr(self, name)}: give 0 or more")
        if not 0 <= self.dropout < 1:
            raise UserError(f"transducer.dropout is {self.dropout}: give a share from 0 to below 1")
        if self.durations:
            check_durations(self.durations)
            if self.fast_emit:
                raise UserError(
                    f"transducer.fast_emit is {self.fast_emit}: give 0 with durations, it is for the plain transducer"
                )
        if self.prune_range < 0 or self.prune_range == 1:
            raise UserError(f"transducer.prune_range is {self.prune_range}: give 2 or more, or 0 for all states")


def check_slice_bytes(settings: TransducerSettings, vocab_size: int, most_labels: int, itemsize: int) -> None:
    """Raise UserError, with the smallest value that works, where `slice_bytes` will be too small for a segment of
    `most_labels` labels, before any training. itemsize: bytes of a number in the products, 2 or 4."""
    # Without bands: of a segment of few frames, pruning keeps more states than prune_range, of a single one all.
    lattices = Lattices([1], [torch.zeros(most_labels, dtype=torch.int64)])
    num_outputs = vocab_size + len(settings.durations)
    frames_of_slice(lattices, settings.joint_dim, num_outputs, itemsize, settings.slice_bytes)


@dataclass
class TransducerOutput:
    """Sums over the segments of a batch, in nats: the step divides by the labels of all ranks and micro-batches."""

    loss_sum: Tensor
    """float32 scalar (float64 for a float64 model): what is minimised, all losses with their weights"""
    transducer_sum: Tensor
    """the transducer's own loss, detached"""
    ctc_sum: Tensor
    """the CTC head's, detached; 0 without one"""


class Joint(nn.Module):
    """The joint network: projections of both sides, added, tanh, and V outputs; then D for durations, if any."""

    def __init__(
        self, encoder_dim: int, prediction_dim: int, joint_dim: int, vocab_size: int, num_durations: int
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.encoder_projection = nn.Linear(encoder_dim, joint_dim)
        self.prediction_projection = nn.Linear(prediction_dim, joint_dim, bias=False)
        self.output = nn.Linear(joint_dim, vocab_size + num_durations)

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Log-probabilities, at least float32, `[..., V + D]` of projected frames and states `[..., J]`: those of the
        outputs sum to 1, and those of the durations."""
        logits = self.output(torch.tanh(encoded + predicted))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        parts = logits.split((self.vocab_size, logits.shape[-1] - self.vocab_size), dim=-1)
        log_probs = [part.log_softmax(dim=-1) for part in parts if part.shape[-1]]
        return log_probs[0] if len(log_probs) == 1 else torch.cat(log_probs, dim=-1)


class TransducerModel(nn.Module):
    """`ConformerEncoder`, prediction network and joint network.

    Under FSDP2, methods that are called from outside need `torch.distributed.fsdp.register_fsdp_forward_method`.
    """

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
        """What the joint network adds of every frame of every row, `[R, T, J]`."""
        return self.joint.encoder_projection(self._hidden(log_mel, segments))

    def ctc_log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Log-probabilities of the CTC head for every frame of every row, float32 (or float64) `[R, T, V]`.

        Raises:
            UserError: the model has no such head.
        """
        if self.ctc_head is None:
            raise UserError("decoder.head is 'ctc', but the transducer was trained with transducer.ctc_weight 0")
        return frame_log_probs(self.ctc_head, self._hidden(log_mel, segments))

    def start(self, num_sequences: int) -> State:
        """The prediction network's state before the first `predict`, whose label is the blank."""
        return self.prediction.start(num_sequences)

    def predict(self, label: Tensor, state: State) -> tuple[Tensor, State]:
        """What the joint network adds after one more label each, int64 `[N]`: `[N, J]`; and the state after it."""
        predicted, state = self.prediction.step(label, state)
        return self.joint.prediction_projection(predicted), state

    def greedy(self, encoded: Tensor, lengths: Tensor, max_symbols: int) -> GreedyState | TDTState:
        """`greedy_search` or `tdt_greedy` of this model; a method, so that FSDP2 can gather the weights around it."""
        if self.settings.durations:
            return tdt_greedy(self, encoded, lengths, self.settings.durations, max_symbols)
        return greedy_search(self, encoded, lengths, max_symbols)

    def _hidden(self, log_mel: Tensor, segments: Segments) -> Tensor:
        return self.encoder(log_mel, self.encoder.layout(segments))

    def forward(
        self,
        log_mel: Tensor,
        segments: Segments,
        labels: Tensor,
        label_lengths: Tensor,
        *,
        train_encoder: bool = True,
    ) -> TransducerOutput:
        """The loss of N segments, each over its own frames and labels only.

        Args:
            log_mel: normalised features, float32 `[R, F, M]`.
            segments: in mel frames.
            labels: int64 `[N, U]` on the CPU, the used segments in the order of rows, then slots; values beyond a
                length are ignored.
            label_lengths: int64 `[N]` on the CPU; 0 is a segment without speech.
            train_encoder: False runs the encoder without a graph: see `CTCModel.forward`.

        Raises:
            UserError: a label is outside the vocabulary, or `slice_bytes` too small for one frame of a segment.
        """
        check_labels(labels, label_lengths, self.vocab_size)
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_encoder):
            hidden = self._hidden(log_mel, segments)
        device, stride = hidden.device, self.encoder.settings.stride
        index, lengths = segment_frames(segments, stride, hidden.shape[1])
        used = torch.arange(index.shape[1]) < lengths[:, None]
        frames = hidden.flatten(0, 1).index_select(0, index[used].to(device))  # [sum T_s, D]
        sequences = [row[:n] for row, n in zip(labels.to(device), label_lengths.tolist(), strict=True)]  # one transfer
        # Of no segment at all: the states of an empty one, none of which is used, keep the graph, which DDP needs.
        predicted = self.prediction(sequences or [index.new_zeros(0, device=device)])
        predicted = predicted[: sum(len(one) + 1 for one in sequences)]
        lattices = Lattices(lengths.tolist(), sequences)

        loss_sum = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        if self.simple_joint is not None:
            simple_losses, lattices = self.simple_joint(frames, predicted, lattices, self.settings.prune_range)
            loss_sum = loss_sum + self.settings.simple_weight * simple_losses.sum()
        encoded, predicted = self.joint.encoder_projection(frames), self.joint.prediction_projection(predicted)
        # The function below is its own autograd, where autocast does not reach: its dtypes are made equal here.
        weight, bias = self.joint.output.weight.to(encoded.dtype), self.joint.output.bias.to(encoded.dtype)
        settings, joint = self.settings, (encoded, predicted, weight, bias, lattices)
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
            loss_sum = loss_sum + self.settings.ctc_weight * ctc_sum
        return TransducerOutput(loss_sum, transducer_sum.detach(), ctc_sum.detach())
