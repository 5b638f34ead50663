"""CTC loss on a GPU, in Triton: one kernel forward and one backward, without a wait of the host.

Segments are read in place, in rows of log-probabilities. The forward kernel has two programs per segment, one from the
first frame to the last and one from the last to the first, which is the same recursion with frames and labels
reversed. The scores of a frame are relative to the largest of them, and the sum of the largest ones is float64, so
float32 scores stay small: the rounding error does not grow with the loss. The backward kernel has one program per
frame. Every alignment is in one state per frame, so the posterior probabilities of a frame are a softmax of the summed
scores and do not drift. No atomic operation is used: results are the same in every run.

Source: Graves et al. 2006, "Connectionist Temporal Classification", section 4.1.

Shapes: N segments, T frames and U labels of one, S = 2 U + 1 states (blanks at even states, label s // 2 at odd state
s), F frames of all rows, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestrq.decoding.tokens import BLANK
from bestrq.recognition.losses.lattices import IMPOSSIBLE
from common.segments import to_device

LARGEST_LOSS = -IMPOSSIBLE / 2
"""a larger loss is that of a segment whose labels do not fit its frames"""
ROW = 7
"""numbers per segment in a plan"""

_IMPOSSIBLE = tl.constexpr(IMPOSSIBLE)
_LOWEST = tl.constexpr(-3e38)
_BLANK = tl.constexpr(BLANK)
_ROW = tl.constexpr(ROW)


@triton.jit
def _read_row(plan, segment):
    """First cells of both directions, first frame, T, U, position of the labels in the plan, and repetitions."""
    row = plan + _ROW * segment
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3).to(tl.int32),
        tl.load(row + 4).to(tl.int32),
        tl.load(row + 5),
        tl.load(row + 6).to(tl.int32),
    )


@triton.jit
def _bound(score):
    """Score of at least that of an impossible path. Not a maximum, which would drop a NaN: the training step checks for
    it."""
    return tl.where(score < _IMPOSSIBLE, _IMPOSSIBLE, score)


@triton.jit
def _add(highest, total, path):
    """Running maximum, and sum of exponentials relative to it, with one more path."""
    higher = tl.where(path > highest, path, highest)
    return higher, total * tl.exp(highest - higher) + tl.exp(path - higher)


@triton.jit
def ctc_scores_kernel(log_probs, plan, scores, losses, vocab, BLOCK: tl.constexpr):
    """Log-probability of all paths from either end to each state of each frame, which is included, relative to the
    frame's largest; and the losses."""
    segment, is_reversed = tl.program_id(0), tl.program_id(1)
    forward_cell, reversed_cell, first_frame, frames, count, labels, _ = _read_row(plan, segment)
    cell = tl.where(is_reversed == 1, reversed_cell, forward_cell)
    step = tl.where(is_reversed == 1, -1, 1)
    states = 2 * count + 1

    s = tl.arange(0, BLOCK)  # in the direction of the recursion; `state` is the place in memory
    exists = s < states
    state = tl.where(is_reversed == 1, states - 1 - s, s)
    is_label = exists & (s % 2 == 1)
    symbol = tl.load(plan + labels + 3 * (state // 2), mask=is_label, other=_BLANK)
    skips = is_label & (s >= 3)
    skips = skips & (symbol != tl.load(plan + labels + 3 * (state // 2 - step), mask=skips, other=_BLANK))

    of_symbols = log_probs + first_frame * vocab + symbol
    upcoming = tl.load(
        of_symbols + tl.where(is_reversed == 1, frames - 1, 0).to(tl.int64) * vocab, mask=exists, other=0.0
    )
    offset = tl.full([], 0.0, tl.float64)
    score = tl.full([BLOCK], _LOWEST, log_probs.dtype.element_ty)
    for t in range(frames):
        frame = tl.where(is_reversed == 1, frames - 1 - t, t).to(tl.int64)
        log_prob = _bound(upcoming)
        upcoming = tl.load(of_symbols + (frame + step) * vocab, mask=exists & (t < frames - 1), other=0.0)  # early
        here = scores + cell + frame * states + state
        before = here - step * states
        follows = exists & (t > 0)
        highest = tl.load(before, mask=follows, other=_IMPOSSIBLE)
        highest = tl.where((t == 0) & (s < 2), 0.0, highest)  # a path starts with a blank or the first label
        total = tl.full([BLOCK], 1.0, log_probs.dtype.element_ty)
        move = tl.load(before - step, mask=follows & (s >= 1), other=_IMPOSSIBLE)
        highest, total = _add(highest, total, move)
        skip = tl.load(before - 2 * step, mask=follows & skips, other=_IMPOSSIBLE)
        highest, total = _add(highest, total, skip)
        score = _bound(highest + tl.log(total) + log_prob)
        largest = tl.max(tl.where(exists, score, _LOWEST), axis=0)
        offset += largest.to(tl.float64)
        score = score - largest
        tl.store(here, score, mask=exists)
        tl.debug_barrier()

    if is_reversed == 0:  # a path ends with the last label or a blank
        last = exists & (s >= states - 2)
        score = tl.where(last, score, _LOWEST)
        largest = tl.max(score, axis=0)
        total = tl.sum(tl.exp(score - largest), axis=0)
        loss = -(offset + largest.to(tl.float64) + tl.log(total).to(tl.float64))
        tl.store(losses + segment, loss.to(log_probs.dtype.element_ty))


@triton.jit
def ctc_posteriors_kernel(log_probs, plan, scores, scale, posteriors, grads, vocab, BLOCK: tl.constexpr):
    """Negative posterior probability of every symbol of a segment at one frame times `scale`."""
    t, segment = tl.program_id(0), tl.program_id(1)
    forward_cell, reversed_cell, first_frame, frames, count, labels, repetitions = _read_row(plan, segment)
    if t < frames:
        states = 2 * count + 1
        frame = first_frame + t
        cell = t.to(tl.int64) * states
        s = tl.arange(0, BLOCK)
        exists = s < states
        symbol = tl.load(plan + labels + 3 * (s // 2), mask=exists & (s % 2 == 1), other=_BLANK)
        score = tl.load(scores + forward_cell + cell + s, mask=exists, other=_LOWEST)
        score += tl.load(scores + reversed_cell + cell + s, mask=exists, other=0.0)
        # The log-probability of the frame is in both scores.
        score -= _bound(tl.load(log_probs + frame * vocab + symbol, mask=exists, other=0.0))
        largest = tl.max(score, axis=0)
        posterior = tl.where(exists, tl.exp(score - largest), 0.0)
        posterior = posterior * (-tl.load(scale + segment) / tl.sum(posterior, axis=0))
        blanks = tl.sum(tl.where(s % 2 == 0, posterior, 0.0), axis=0)
        tl.store(grads + frame * vocab + _BLANK, blanks)
        tl.store(posteriors + forward_cell + cell + s, posterior, mask=exists)
        tl.debug_barrier()

        # The first of equal labels adds up the posteriors of all of them, in their order.
        u = tl.arange(0, BLOCK // 2)
        entry = plan + labels + 3 * u
        is_first = (u < count) & (tl.load(entry + 2, mask=u < count, other=0) == 1)
        label = tl.load(entry, mask=is_first, other=0)
        of_labels = posteriors + forward_cell + cell + 1
        total = tl.load(of_labels + 2 * u, mask=is_first, other=0.0)
        following = tl.load(entry + 1, mask=is_first, other=-1)
        for _ in range(repetitions):
            continues = following >= 0
            total += tl.load(of_labels + 2 * following, mask=continues, other=0.0)
            following = tl.load(plan + labels + 3 * following + 1, mask=continues, other=-1)
        tl.store(grads + frame * vocab + label, total, mask=is_first)


def make_plan(starts: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Numbers that the kernels need, in one tensor on the CPU.

    Rows of N segments: first cell (of T x S) in scores from the front and from the back, first frame, T, U, position of
    its labels in the plan, and the largest number of repetitions of a label. Then every label, with the next position
    of the same label in its segment (-1: none), and whether it is the first one.

    Args:
        starts, lengths, labels, label_lengths: see `ctc_losses`.

    Returns:
        int64 `[7 N + 3 sum U]`.
    """
    cells = lengths * (2 * label_lengths + 1)
    first_cell = cells.cumsum(0) - cells
    first_label = label_lengths.cumsum(0) - label_lengths
    position = torch.arange(labels.shape[1]).expand_as(labels)
    used = position < label_lengths[:, None]
    segment = torch.arange(len(labels))[:, None].expand_as(labels)[used]
    flat, position = labels[used], position[used]

    order = flat.argsort(stable=True)
    order = order[segment[order].argsort(stable=True)]  # by segment, label, position
    equal = (flat[order[1:]] == flat[order[:-1]]) & (segment[order[1:]] == segment[order[:-1]])
    earlier, later = order[:-1][equal], order[1:][equal]
    following, is_first = torch.full_like(flat, -1), torch.ones_like(flat)
    following[earlier] = position[later]
    is_first[later] = 0
    index = torch.arange(len(order))
    run_start = torch.cat((index[:1], index[1:].masked_fill(equal, 0))).cummax(0).values
    repeated = torch.zeros_like(lengths).scatter_reduce_(0, segment[order], index - run_start, "amax")

    first_entry = len(lengths) * ROW + 3 * first_label
    rows = (first_cell, first_cell + cells.sum(), starts, lengths, label_lengths, first_entry, repeated)
    return torch.cat((torch.stack(rows, dim=1).flatten(), torch.stack((flat, following, is_first), dim=1).flatten()))


def launch_options(most_labels: int) -> dict[str, int]:
    """Constants of both kernels for segments of at most this number of labels; they are compiled once per set."""
    block = max(triton.next_power_of_2(2 * most_labels + 1), 32)
    return {"BLOCK": block, "num_warps": min(max(block // 64, 1), 32)}


class CTCAlignments(torch.autograd.Function):
    """Negative log-probability of the labels of every segment, `[N]`; see `ctc_losses` for the arguments.

    Two numbers per cell (T x S) are kept for the backward pass; one more exists during it.
    """

    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, starts: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> Tensor:
        log_probs, num_segments = log_probs.contiguous(), len(lengths)
        ctx.num_cells = int((lengths * (2 * label_lengths + 1)).sum())
        ctx.most_frames = int(lengths.max()) if num_segments else 0
        ctx.options = launch_options(int(label_lengths.max()) if num_segments else 0)
        plan = to_device(make_plan(starts, lengths, labels, label_lengths), log_probs.device)
        directions = 2 if ctx.needs_input_grad[0] else 1
        scores, losses = log_probs.new_empty(directions * ctx.num_cells), log_probs.new_empty(num_segments)
        if num_segments:
            with torch.cuda.device_of(log_probs):
                ctc_scores_kernel[num_segments, directions](
                    log_probs, plan, scores, losses, log_probs.shape[1], **ctx.options
                )
        impossible = losses > LARGEST_LOSS  # False for NaN
        ctx.save_for_backward(log_probs, plan, scores, impossible)
        return losses.masked_fill(impossible, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_probs, plan, scores, impossible = ctx.saved_tensors
        grad, posteriors = torch.zeros_like(log_probs), scores.new_empty(ctx.num_cells)
        scale = grads[0].masked_fill(impossible, 0.0).contiguous()
        if len(scale):
            with torch.cuda.device_of(log_probs):
                ctc_posteriors_kernel[ctx.most_frames, len(scale)](
                    log_probs, plan, scores, scale, posteriors, grad, log_probs.shape[1], **ctx.options
                )
        return grad, None, None, None, None
