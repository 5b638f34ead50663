"""RNN-T and TDT losses of given outputs of a joint network, with the arguments of transformers and of NeMo.

    from bestrq.recognition.losses.dense import rnnt_loss, tdt_loss

`rnnt_loss` and `tdt_loss` replace the functions of the same names in transformers (loss_rnnt.py and loss_tdt.py,
version 5.23), `NemoRNNTLoss` and `NemoTDTLoss` replace NeMo's `RNNTLossPytorch` and `TDTLossPytorch`. Losses are exact
in float64, and in float32 have the accuracy of the training losses, whose sums over alignments they share. Beside the
gradient of the outputs, which any such loss returns, memory is a slice of the outputs and a few numbers per cell.

The whole outputs `[B, T, U + 1, V]` are the main cost: `transducer.transducer_loss` and `tdt.tdt_loss` compute them in
slices, from frames and states.

Shapes: B segments, padded to T frames and U labels; V tokens with the blank, D durations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.recognition.losses.lattices import Lattices
from bestrq.recognition.losses.tdt import check_durations, sum_over_durations
from bestrq.recognition.losses.transducer import duration_backward_, sum_over_alignments, token_backward_
from common.errors import UserError

SLICE_BYTES = 16 * 2**20
"""bytes of a slice of token outputs in float32; a pass has two of them"""
REDUCTIONS = ("mean_volume", "mean_batch", "mean", "sum", "none")


def rnnt_loss(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, blank_token_id: int,
    reduction: str = "mean_volume",
) -> Tensor:  # fmt: skip
    """RNN-T loss in nats, float32 (float64 for float64); see `tdt_loss` for the arguments and errors.

    Args:
        logits: `[B, T, U + 1, V]`, outputs of the joint network before their softmax.

    Source: Graves 2012, arXiv 1211.3711.
    """
    lattices = _make_lattices(logits, targets, logit_lengths, target_lengths, blank_token_id)
    arcs = _DenseArcs.apply(logits, None, lattices, blank_token_id)
    return _reduce(sum_over_alignments(arcs, lattices), target_lengths, reduction)


def tdt_loss(
    token_logits: Tensor, duration_logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor,
    blank_token_id: int, durations: Sequence[int], sigma: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """TDT loss in nats, float32 (float64 for float64).

    Lengths and targets on a GPU are copied to the host, which waits for them; give them on the CPU to avoid this.

    Args:
        token_logits: `[B, T, U + 1, V]`, float64, float32, bfloat16 or float16, in any layout.
        duration_logits: `[B, T, U + 1, D]`, in the same dtype, on the same device.
        targets: integers `[B, U]`; labels beyond a length are ignored.
        logit_lengths: integers `[B]`, frames of every segment, 1 to T. Outputs beyond have gradients of zero.
        target_lengths: integers `[B]`, labels of every segment, 0 to U.
        blank_token_id: index of the blank among the V tokens.
        durations: frames of every duration output, increasing from 0 and 1.
        sigma: nats subtracted from every token's log-probability (section 3.3 of the paper).
        reduction: `none` for all losses `[B]`; `sum`; `mean_batch`, their mean; `mean`, the mean of every loss divided
            by its number of labels (infinite without labels, as in the other implementations); `mean_volume`, the sum
            divided by the number of all labels.

    Raises:
        UserError: an unknown reduction, shapes that do not fit, a length or a label outside its range, a label that is
            the blank, or durations that `check_durations` refuses.

    Source: Xu et al. 2023, arXiv 2304.06795.
    """
    check_durations(durations)
    expected = (*token_logits.shape[:3], len(durations))
    if tuple(duration_logits.shape) != expected:
        raise UserError(
            f"duration_logits has the shape {list(duration_logits.shape)}: give {list(expected)}, which is that of "
            f"token_logits with one output for each of the durations {list(durations)}"
        )
    lattices = _make_lattices(token_logits, targets, logit_lengths, target_lengths, blank_token_id)
    arcs = _DenseArcs.apply(token_logits, duration_logits, lattices, blank_token_id)
    return _reduce(sum_over_durations(arcs, lattices, durations, sigma), target_lengths, reduction)


class NemoRNNTLoss(nn.Module):
    """`rnnt_loss` with the arguments of NeMo's `RNNTLossPytorch`; `reduction` may also be None, as in `RNNTLoss`."""

    def __init__(self, blank: int, reduction: str | None) -> None:
        super().__init__()
        self.blank, self.reduction = blank, reduction or "none"

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        """Loss of outputs `[B, T, U + 1, V]`."""
        return rnnt_loss(acts, labels, act_lens, label_lens, self.blank, self.reduction)


class NemoTDTLoss(nn.Module):
    """`tdt_loss` with the arguments of NeMo's `TDTLossPytorch`, whose sums end at 1,000 nats; these do not."""

    def __init__(self, blank: int, durations: Sequence[int], reduction: str | None = "sum", sigma: float = 0.0) -> None:
        super().__init__()
        self.blank, self.durations, self.reduction, self.sigma = blank, durations, reduction or "none", sigma

    def forward(self, acts: Tensor, labels: Tensor, act_lens: Tensor, label_lens: Tensor) -> Tensor:
        """Loss of outputs `[B, T, U + 1, V + D]`, tokens first."""
        sizes = (acts.shape[-1] - len(self.durations), len(self.durations))
        tokens, spans = acts.split(sizes, dim=-1)
        return tdt_loss(
            tokens, spans, labels, act_lens, label_lens, self.blank, self.durations, self.sigma, self.reduction
        )


def _make_lattices(
    logits: Tensor, targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, blank: int
) -> Lattices:
    """Lattices of a padded batch; UserError for arguments that do not fit."""
    if logits.dim() != 4:
        raise UserError(f"the logits have the shape {list(logits.shape)}: give [B, T, U + 1, V]")
    batch, most_frames, most_states, vocab_size = logits.shape
    if targets.dim() != 2 or len(targets) != batch or targets.shape[1] < most_states - 1:
        raise UserError(
            f"targets has the shape {list(targets.shape)}: logits of the shape {list(logits.shape)} need "
            f"[{batch}, {most_states - 1}]"
        )
    if not 0 <= blank < vocab_size:
        raise UserError(f"blank_token_id is {blank}: give 0 to {vocab_size - 1}, the last of {vocab_size} logits")
    labels = targets.cpu().long()
    frames, counts = logit_lengths.tolist(), target_lengths.tolist()
    ranges = [("logit_lengths", frames, 1, most_frames), ("target_lengths", counts, 0, most_states - 1)]
    for name, lengths, least, most in ranges:
        if len(lengths) != batch or not all(least <= length <= most for length in lengths):
            raise UserError(f"{name} is {lengths}: give one length from {least} to {most} for each of {batch} segments")
    for segment, count in enumerate(counts):
        for position, label in enumerate(labels[segment, :count].tolist()):
            if label == blank or not 0 <= label < vocab_size:
                raise UserError(
                    f"label {label} at position {position} of segment {segment}: give 0 to {vocab_size - 1} except for "
                    f"{blank}, the blank"
                )
    placed = targets.to(logits.device, torch.int64)
    return Lattices(frames, [row[:count] for row, count in zip(placed, counts, strict=True)])


@dataclass(frozen=True)
class _Slice:
    """Consecutive frames of one segment."""

    cells: slice
    """position among the cells of all segments"""
    logits: tuple[int, slice, slice]
    """position among the padded outputs"""
    labels: Tensor
    """int64 [U + 1]: next label of every state, and the blank for the last one, which has none"""

    def arcs(self, arcs: Tensor) -> Tensor:
        """View `[t, U + 1, A]` of arcs `[cells, A]`."""
        return arcs[self.cells].view(-1, len(self.labels), arcs.shape[1])


def _slices(lattices: Lattices, num_outputs: int, blank: int) -> Iterator[_Slice]:
    """Slices whose outputs take at most `SLICE_BYTES` in float32, or one frame each."""
    cell = 0
    for segment, frames in enumerate(lattices.num_frames):
        states = lattices.num_states(segment)
        labels = F.pad(lattices.labels[segment], (0, 1), value=blank)
        step = max(1, SLICE_BYTES // (4 * states * num_outputs))
        for first in range(0, frames, step):
            stop = min(first + step, frames)
            cells = slice(cell + first * states, cell + stop * states)
            yield _Slice(cells, (segment, slice(first, stop), slice(states)), labels)
        cell += frames * states


class _DenseArcs(torch.autograd.Function):
    """Log-probabilities of blank, next label and durations of every cell, `[cells, 2 + D]`, at least float32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, durations: Tensor | None, lattices: Lattices, blank: int) -> Tensor:
        ctx.lattices, ctx.blank = lattices, blank
        wide = torch.promote_types(tokens.dtype, torch.float32)
        arcs = tokens.new_empty(sum(lattices.cells), 2 + (0 if durations is None else durations.shape[-1]), dtype=wide)
        for part in _slices(lattices, tokens.shape[-1], blank):
            logits, out = tokens[part.logits].to(wide), part.arcs(arcs)
            normaliser = logits.logsumexp(dim=-1)
            torch.sub(logits[..., blank], normaliser, out=out[..., 0])
            label = logits.gather(-1, part.labels.expand(logits.shape[:2])[..., None]).squeeze(-1)
            torch.sub(label, normaliser, out=out[..., 1])
            if durations is not None:
                out[..., 2:] = durations[part.logits].to(wide).log_softmax(dim=-1)
        ctx.save_for_backward(*([tokens] if durations is None else [tokens, durations]))
        return arcs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        results = [torch.empty_like(outputs) for outputs in inputs]
        for result in results:
            for segment, frames in enumerate(ctx.lattices.num_frames):
                result[segment, frames:].zero_()  # padding
                result[segment, :frames, ctx.lattices.num_states(segment) :].zero_()
        for part in _slices(ctx.lattices, inputs[0].shape[-1], ctx.blank):
            grad = part.arcs(grads[0])
            for outputs, result in zip(inputs, results, strict=True):
                view = result[part.logits].copy_(outputs[part.logits])
                wide = view if view.dtype == grad.dtype else view.to(grad.dtype)
                if outputs is inputs[0]:
                    token_backward_(wide, grad, part.labels, ctx.blank)
                else:
                    duration_backward_(wide, grad)
                if wide is not view:
                    view.copy_(wide)
        return *results, *([None] * (4 - len(results)))


def _reduce(losses: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    """Losses `[B]` reduced as in transformers and NeMo."""
    if reduction not in REDUCTIONS:
        raise UserError(f"reduction is {reduction!r}: give one of {', '.join(REDUCTIONS)}")
    if reduction == "none":
        return losses
    if reduction == "mean_batch":
        return losses.mean()
    if reduction == "sum":
        return losses.sum()
    lengths = target_lengths.to(losses)
    return losses.sum() / lengths.sum() if reduction == "mean_volume" else (losses / lengths).mean()
