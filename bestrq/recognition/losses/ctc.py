"""CTC loss of segments of packed rows, by torch on a CPU and by Triton's kernels on a GPU (`ctc_kernels`)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.decoding.tokens import BLANK
from bestrq.recognition.losses.backend import use_kernels
from common.segments import to_device


def ctc_losses(log_probs: Tensor, starts: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Negative log-probability of the labels of every segment in nats, `[N]` in the dtype of `log_probs`; 0, with
    gradients of 0, for a segment whose labels do not fit its frames.

    On a GPU the host does not wait, and the result is the same in every run.

    Args:
        log_probs: of all rows, float32 or float64 `[F, V]`.
        starts, lengths: first frame and number of frames, 1 or more, of every segment, int64 `[N]` on the CPU; segments
            do not overlap.
        labels: int64 `[N, U]` on the CPU, from 1 to V - 1; values beyond a length are ignored.
        label_lengths: int64 `[N]` on the CPU.
    """
    if use_kernels(log_probs):
        from bestrq.recognition.losses import ctc_kernels

        losses: Tensor = ctc_kernels.CTCAlignments.apply(log_probs, starts, lengths, labels, label_lengths)
        return losses
    if not len(lengths):  # F.ctc_loss rejects an empty batch; this keeps the graph, which DDP needs
        return log_probs[:0, 0]
    device = log_probs.device
    index = starts[:, None] + torch.minimum(torch.arange(int(lengths.max())), lengths[:, None] - 1)
    frames = log_probs.index_select(0, to_device(index.flatten(), device)).unflatten(0, index.shape)
    # The lengths stay on the CPU, where torch reads them. The loss of an impossible segment is infinite; zero_infinity
    # removes it and its gradients.
    return F.ctc_loss(
        frames.transpose(0, 1), to_device(labels, device), lengths, label_lengths, BLANK,
        reduction="none", zero_infinity=True,
    )  # fmt: skip
