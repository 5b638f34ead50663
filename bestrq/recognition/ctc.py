"""CTC model for packed rows: encoder, linear head, and the loss over each segment's own frames.

Shapes: R rows, F mel frames per row, M mel bins, T encoder frames per row, V vocabulary, S segment slots per row, N
segments of the batch, U label length. Label 0 is the blank.

Source: Graves et al. 2006, "Connectionist Temporal Classification".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.recognition.losses.ctc import ctc_losses
from common.segments import Segments


@dataclass
class CTCOutput:
    """Sums over the segments of a batch; the training step divides by the labels of all ranks and micro-batches."""

    loss_sum: Tensor
    """float32 scalar in nats (float64 for a float64 model); impossible segments contribute 0"""
    num_impossible: int
    """segments whose labels need more frames than the segment has"""


def pad_labels(labels: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad label sequences with 0 to int64 `[N, U]`; return them and their lengths, int64 `[N]`."""
    lengths = torch.tensor([len(sequence) for sequence in labels], dtype=torch.int64)
    padded = torch.zeros(len(labels), max(map(len, labels), default=0), dtype=torch.int64)
    for row, sequence in zip(padded, labels, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return padded, lengths


def segment_frames(segments: Segments, stride: int, num_frames: int) -> tuple[Tensor, Tensor]:
    """Indices of the encoder frames of every used segment, ordered by row, then slot.

    Args:
        segments: in mel frames.
        stride: mel frames per encoder frame.
        num_frames: encoder frames T per row.

    Returns:
        index: int64 `[N, T_max]`, row * T + t; positions beyond the end of a segment repeat its last frame.
        lengths: int64 `[N]`, encoder frames of every segment.
    """
    rows, slots = segments.length.nonzero(as_tuple=True)
    starts = rows * num_frames + segments.start[rows, slots] // stride
    lengths = (segments.length[rows, slots] + stride - 1) // stride
    steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
    return starts[:, None] + torch.minimum(steps, lengths[:, None] - 1), lengths


def frames_needed(labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Minimum number of encoder frames for each label sequence, int64 `[N]`: one per label, and one blank between
    equal neighbours."""
    positions = torch.arange(1, max(labels.shape[1], 1), device=labels.device)
    repeated = (labels[:, 1:] == labels[:, :-1]) & (positions < label_lengths[:, None])
    return label_lengths + repeated.sum(dim=1)


def frame_log_probs(head: nn.Module, hidden: Tensor) -> Tensor:
    """Log-probabilities `[..., V]` of a linear head, at least float32 under any autocast: bfloat16 log-probabilities of
    a few nats have an error of 1 %."""
    logits = head(hidden)
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def ctc_loss(log_probs: Tensor, segments: Segments, stride: int, labels: Tensor, label_lengths: Tensor) -> CTCOutput:
    """CTC loss of N segments, each over its own frames of the rows `[R, T, V]`.

    Args:
        log_probs: `[R, T, V]`.
        segments: in mel frames.
        stride: mel frames per encoder frame.
        labels, label_lengths: on the CPU, see `CTCModel.forward`.
    """
    index, lengths = segment_frames(segments, stride, log_probs.shape[1])
    possible = lengths >= frames_needed(labels, label_lengths)
    starts = index[:, :1].flatten()
    loss_sum = ctc_losses(log_probs.flatten(0, 1), starts, lengths, labels, label_lengths).sum()
    return CTCOutput(loss_sum=loss_sum, num_impossible=int((~possible).sum()))


class CTCModel(nn.Module):
    """`ConformerEncoder` and a linear head of V outputs."""

    inference_methods = ("log_probs",)
    """methods besides `forward` for which FSDP2 gathers weights"""

    def __init__(self, encoder: EncoderSettings, vocab_size: int) -> None:
        super().__init__()
        self.encoder = ConformerEncoder(encoder)
        self.head = nn.Linear(encoder.dim, vocab_size)

    def log_probs(self, log_mel: Tensor, segments: Segments) -> Tensor:
        """Log-probabilities at every frame of every row, float32 (or float64) `[R, T, V]`."""
        return self._log_probs(log_mel, segments)

    def _log_probs(
        self, log_mel: Tensor, segments: Segments, frozen_blocks: int | None = None, masked: Tensor | None = None
    ) -> Tensor:
        return frame_log_probs(self.head, self.encoder(log_mel, self.encoder.layout(segments), frozen_blocks, masked))

    def forward(
        self,
        log_mel: Tensor,
        segments: Segments,
        labels: Tensor,
        label_lengths: Tensor,
        *,
        frozen_blocks: int | None = None,
        masked: Tensor | None = None,
    ) -> CTCOutput:
        """CTC loss of N segments, each over its own frames only.

        Args:
            log_mel: normalised features, float32 `[R, F, M]`.
            segments: in mel frames.
            labels: int64 `[N, U]` on the CPU, of the used segments, ordered by row, then slot; values beyond a length
                are ignored. No label is 0, the blank.
            label_lengths: int64 `[N]` on the CPU; 0 for a segment without speech.
            frozen_blocks: freeze the subsampling and this number of blocks in this step: they run without a graph and
                their gradients stay None, so they get no optimizer state, no weight decay and no share of the gradient
                norm. DDP then needs `find_unused_parameters=True`. None freezes nothing.
            masked: outputs of the subsampling to set to 0, see `ConformerEncoder.forward`.
        """
        # Not `log_probs`: as a registered FSDP2 method, it would gather the weights a second time.
        log_probs = self._log_probs(log_mel, segments, frozen_blocks, masked)
        return ctc_loss(log_probs, segments, self.encoder.settings.stride, labels, label_lengths)
