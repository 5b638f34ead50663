"""Transducer loss in bounded memory, without the joint network's outputs for a complete lattice.

Of the V outputs at a cell (t, u) of the lattice, the loss needs two: the log-probabilities of the blank and of the next
label. They are computed over slices of time, as many frames as a byte budget allows, and again in the backward pass, so
that no `[T, U, V]` tensor exists. The sum over all alignments is then torchaudio's `rnnt_loss` for a vocabulary of two,
or on a GPU a kernel of our own (`kernels.py`).
The joint network is never computed for padding, neither in time nor in labels.

Sources: Graves 2012, arXiv 1211.3711; FastEmit: Yu et al. 2021, arXiv 2010.11148.

Shapes: N segments, T_s frames and U_s labels of segment s (T and U of a single one), J joint width, V vocabulary, D
durations (`tdt`; 0 here), t frames of a slice, W states per frame. Label 0 is the blank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bestrq.decoding.tokens import BLANK
from bestrq.recognition.losses.backend import use_kernels
from bestrq.recognition.losses.lattices import IMPOSSIBLE, Lattices, to_device
from common.errors import UserError

CPU_SLICE_BYTES = 64 * 2**20
"""maximum bytes of a slice on the CPU. Slices of 8 MiB, which fit into the cache, take 6 % less processor time, but
every operation on a slice is a barrier for all threads: with another process on one core, they took 3 times as long"""


def bytes_per_cell(joint_dim: int, vocab_size: int, itemsize: int) -> int:
    """Bytes per cell of a slice at the peak of the backward pass."""
    # Hidden units, their gradient, and hidden units before tanh or wide; logits as computed and wide, and gradient.
    wide = max(itemsize, 4)
    return joint_dim * (2 * itemsize + wide) + 2 * vocab_size * wide + (vocab_size * itemsize if itemsize < wide else 0)


def frames_per_slice(lattices: Lattices, joint_dim: int, vocab_size: int, itemsize: int, budget: int) -> list[int]:
    """Frames per slice, 1 or more, for every segment.

    Raises:
        UserError: a single frame takes more than `budget` bytes; the message states the smallest sufficient budget.
    """
    cell = bytes_per_cell(joint_dim, vocab_size, itemsize)
    widths = [lattices.width(segment) for segment in range(len(lattices.labels))]
    needed = max(widths, default=0) * cell
    if needed > budget:
        raise UserError(
            f"transducer.slice_bytes is {budget}: one frame of a segment of {max(map(len, lattices.labels))} labels "
            f"takes {needed} bytes; give {needed} or more, or cut shorter segments (data.max_seconds)"
        )
    return [budget // (width * cell) for width in widths]


@dataclass(frozen=True)
class _Slice:
    """Consecutive frames of one segment's lattice."""

    frames: slice
    """position among the frames of all segments"""
    states: slice
    """position of the segment's states among the states of all segments"""
    cells: slice
    """position among the cells of all segments, which are ordered by segment, then frame"""
    labels: Tensor
    """int64 [W], or with bands [t, W]: next label of every state; 0 for the last state, which has none"""
    band: Tensor | None
    """int64 [t, W]: states of every frame's band, relative to `states`; None without bands"""

    def hidden(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Hidden units `[t, W, J]`."""
        states = predicted[self.states]
        return (encoded[self.frames, None] + (states if self.band is None else states[self.band])).tanh_()

    def select_states(self, first: int, stop: int) -> "_Slice":
        """Copy with states first to stop - 1 of the W states of every frame; `cells` is unchanged."""
        if self.band is not None:
            return replace(self, labels=self.labels[:, first:stop], band=self.band[:, first:stop])
        states = slice(self.states.start + first, self.states.start + stop)
        return replace(self, labels=self.labels[first:stop], states=states)


def _slices(lattices: Lattices, weight: Tensor, budget: int) -> Iterator[_Slice]:
    vocab_size, joint_dim = weight.shape
    frame = state = cell = 0
    sizes = frames_per_slice(lattices, joint_dim, vocab_size, weight.element_size(), budget)
    for segment, (frames, size) in enumerate(zip(lattices.num_frames, sizes, strict=True)):
        states, width = lattices.num_states(segment), lattices.width(segment)
        size = min(size, max(1, size * CPU_SLICE_BYTES // budget)) if weight.device.type == "cpu" else size
        next_labels = F.pad(lattices.labels[segment], (0, 1), value=BLANK)
        for first in range(0, frames, size):
            stop = min(first + size, frames)
            band = lattices.band(segment, slice(first, stop))
            labels = next_labels if band is None else next_labels[band]
            cells = slice(cell + first * width, cell + stop * width)
            yield _Slice(slice(frame + first, frame + stop), slice(state, state + states), cells, labels, band)
        frame, state, cell = frame + frames, state + states, cell + frames * width


def _visited_states(flow: Tensor) -> Tensor:
    """First state that the alignments of a slice visit, and the state after the last; int64 `[2]`.

    In every frame, the gradients of all other states sum to less than the rounding error of the frame's gradients.

    Args:
        flow: absolute gradients of the cells `[t, W]`.
    """
    num_states = flow.shape[1]
    tails = torch.stack((flow, flow.flip(1))).cumsum(dim=2)
    least = tails[0, :, -1].amax() * (torch.finfo(flow.dtype).eps / 2)  # on either side
    # Not "tails >= least": NaN must reach the gradients, which the training step checks.
    outside = (tails < least).all(dim=1).sum(dim=1)
    first, stop = outside[0], num_states - outside[1]
    eights = (stop - first + 7) // 8 * 8  # oneDNN generates and caches code for every size
    return torch.stack((first, (first + eights).clamp(max=num_states)))


class ArcScores(torch.autograd.Function):
    """Log-probabilities of every cell: blank, next label, and D durations.

    The durations are the last D outputs and have their own softmax (see `tdt_loss`).
    """

    @staticmethod
    def forward(
        ctx: Any, encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, lattices: Lattices, budget: int,
        num_durations: int = 0,
    ) -> Tensor:  # fmt: skip
        """`[cells, 2 + D]`, at least float32."""
        num_tokens = len(weight) - num_durations
        ctx.lattices, ctx.budget, ctx.num_tokens = lattices, budget, num_tokens
        wide = torch.promote_types(encoded.dtype, torch.float32)
        arcs = encoded.new_empty(sum(lattices.cells), 2 + num_durations, dtype=wide)
        for part in _slices(lattices, weight, budget):
            hidden = part.hidden(encoded, predicted)
            if num_durations:
                spans = F.linear(hidden, weight[num_tokens:], bias[num_tokens:]).to(wide)
                arcs[part.cells, 2:] = spans.log_softmax(dim=-1).flatten(0, 1)
            log_probs = F.linear(hidden, weight[:num_tokens], bias[:num_tokens]).to(wide).log_softmax(dim=-1)
            arcs[part.cells, 0] = log_probs[..., BLANK].flatten()
            # The last state has no next label: its arc is never used, but must be finite.
            arcs[part.cells, 1] = log_probs.gather(-1, part.labels.expand(log_probs.shape[:2])[..., None]).flatten()
            del hidden, log_probs  # before the next slice is allocated
        ctx.save_for_backward(encoded, predicted, weight, bias)
        return arcs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (encoded, predicted, weight, bias), wide = ctx.saved_tensors, grads[0].dtype
        totals = [torch.zeros_like(tensor, dtype=wide) for tensor in ctx.saved_tensors]
        grad_encoded, grad_predicted, grad_weight, grad_bias = totals
        # Tokens and durations apart: a softmax of a part of the outputs would copy it.
        groups = [slice(ctx.num_tokens), *([slice(ctx.num_tokens, None)] if ctx.num_tokens < len(weight) else [])]
        parts = list(_slices(ctx.lattices, weight, ctx.budget))
        grad_parts = [grads[0][part.cells].view(-1, part.labels.shape[-1], grads[0].shape[1]) for part in parts]
        spans = [[0, part.labels.shape[-1]] for part in parts]
        if weight.device.type == "cpu":  # a GPU's slices are too long to leave out many states, and the host would wait
            spans = [_visited_states(grad[..., :2].abs().sum(dim=-1)).tolist() for grad in grad_parts]
        for part, grad, (first, stop) in zip(parts, grad_parts, spans, strict=True):
            grad, part = grad[:, first:stop], part.select_states(first, stop)
            hidden = part.hidden(encoded, predicted)
            flat_hidden, products = hidden.flatten(0, 1), []
            for outputs in groups:
                grad_logits = F.linear(hidden, weight[outputs], bias[outputs]).to(wide)
                if outputs is groups[0]:
                    token_backward_(grad_logits, grad, part.labels)
                else:
                    duration_backward_(grad_logits, grad)
                grad_bias[outputs] += grad_logits.sum(dim=(0, 1))
                flat = grad_logits.flatten(0, 1).to(hidden.dtype)
                grad_weight[outputs] += flat.mT @ flat_hidden
                products.append(flat @ weight[outputs])
                del grad_logits, flat
            grad_hidden = reduce(Tensor.add_, products)
            del products  # or the product would be kept until the next slice
            grad_hidden = torch.ops.aten.tanh_backward(grad_hidden.view_as(hidden), hidden)
            grad_encoded[part.frames] += grad_hidden.sum(dim=1, dtype=wide)
            if part.band is None:
                grad_predicted[part.states] += grad_hidden.sum(dim=0, dtype=wide)
            else:
                grad_predicted[part.states].index_add_(0, part.band.flatten(), grad_hidden.flatten(0, 1).to(wide))
            del hidden, flat_hidden, grad_hidden  # before the next slice is allocated
        return *(total.to(x.dtype) for total, x in zip(totals, ctx.saved_tensors, strict=True)), None, None, None


def token_backward_(logits: Tensor, grad: Tensor, labels: Tensor, blank: int = BLANK) -> None:
    """Overwrite token logits `[t, W, V]` with their gradients, from the gradients of arcs `[t, W, 2 + D]`."""
    # d log p(k) / d logits = onehot(k) - softmax
    grad_label = grad[..., 1:2] * (labels != blank)[..., None]
    torch.mul(logits.softmax(dim=-1), -(grad[..., :1] + grad_label), out=logits)
    logits[..., blank : blank + 1] += grad[..., :1]
    logits.scatter_add_(-1, labels.expand(grad.shape[:2])[..., None], grad_label)


def duration_backward_(logits: Tensor, grad: Tensor) -> None:
    """Overwrite duration logits `[t, W, D]` with their gradients, from the gradients of arcs `[t, W, 2 + D]`."""
    torch.mul(logits.softmax(dim=-1), -grad[..., 2:].sum(dim=-1, keepdim=True), out=logits)
    logits += grad[..., 2:]


def transducer_loss(
    encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, lattices: Lattices, slice_bytes: int,
    fast_emit: float = 0.0,
) -> Tensor:  # fmt: skip
    """Negative log-probability of every segment's labels in nats, float32 `[N]` (float64 for float64).

    In addition to the slices, a cell takes about 36 bytes (45 in lattices padded to one size) while alignments are
    summed. 8 of them, the gradients of its two log-probabilities, are kept until the backward pass.

    Args:
        encoded: `[sum T_s, J]`, encoder side of the joint network, concatenated over the segments.
        predicted: `[sum (U_s + 1), J]`, prediction side, in the same dtype.
        weight, bias: `[V, J]` and `[V]`, output layer of the joint network, in the same dtype.
        slice_bytes: memory of a slice.
        fast_emit: relative increase of the gradients of labels, for earlier emission; the loss value is unchanged.

    Raises:
        UserError: `slice_bytes` is too small for a single frame; the message states the smallest sufficient value.
    """
    arcs = ArcScores.apply(encoded, predicted, weight, bias, lattices, slice_bytes)
    return sum_over_alignments(arcs, lattices, fast_emit)


def sum_over_alignments(arcs: Tensor, lattices: Lattices, fast_emit: float = 0.0) -> Tensor:
    """Negative log of the total probability of all alignments, `[N]`, from the log-probabilities (blank, next label) of
    all cells, `[cells, 2]`; see `transducer_loss`."""
    if fast_emit and arcs.requires_grad:
        arcs = arcs.view_as(arcs)  # the hook must not affect other uses of the tensor
        arcs.register_hook(lambda grad: grad * to_device([1.0, 1.0 + fast_emit], grad.device, grad.dtype))
    if use_kernels(arcs):
        from bestrq.recognition.losses.kernels import Alignments

        return Alignments.apply(arcs, lattices)
    parts = [_full_lattice(part, lattices, segment) for segment, part in enumerate(arcs.split(lattices.cells))]
    losses = [arcs[:0, 0]]  # keeps the graph of a batch without segments, which DDP needs
    order = [segment for segment, part in enumerate(parts) if min(part.shape[:2]) == 1]
    if order:
        losses.append(_single_alignments([parts[segment] for segment in order]))
    others = sorted(set(range(len(parts))) - set(order), key=lambda segment: parts[segment].shape)
    for group in padding_groups([parts[segment].shape for segment in others]):
        losses.append(_sum_over_alignments([parts[segment] for segment in others[group]]))
    order += others
    return torch.cat(losses)[to_device(sorted(range(len(order)), key=order.__getitem__), arcs.device)]


def _single_alignments(parts: Sequence[Tensor]) -> Tensor:
    """Losses `[n]` of lattices `[T, U + 1, 2]` with U = 0 or T = 1: all labels at the first frame, then all blanks.

    torchaudio's CUDA kernel returns before it writes the costs of such lattices, whose values are then arbitrary
    (2.11, `ComputeBetasCosts` in rnnt/gpu/gpu_kernels.cuh: only threads with t <= T - 2 and u <= U - 1 work).
    """
    paths = [torch.cat((part[0, :-1, 1], part[:, -1, BLANK])) for part in parts]
    return -pad_sequence(paths, batch_first=True).sum(dim=1)


def _full_lattice(part: Tensor, lattices: Lattices, segment: int) -> Tensor:
    """Arcs `[T, U + 1, 2]` of one segment, impossible outside its bands."""
    frames, states, width = lattices.num_frames[segment], lattices.num_states(segment), lattices.width(segment)
    part, band = part.view(frames, width, 2), lattices.band(segment)
    if band is None:
        return part
    full = part.new_full((frames, states, 2), IMPOSSIBLE)
    return full.scatter(1, band[..., None].expand(-1, -1, 2), part)


def padding_groups(shapes: Sequence[Sequence[int]], waste: float = 1.25) -> Iterator[slice]:
    """Groups of sorted shapes, as slices: padded to one size, their lattices have at most `waste` times the cells."""
    start, most_states, used = 0, 0, 0
    for stop, (frames, states, _) in enumerate(shapes):
        most_states, used = max(most_states, states), used + frames * states
        if frames * most_states * (stop + 1 - start) > waste * used:
            yield slice(start, stop)
            start, most_states, used = stop, states, frames * states
    if shapes:
        yield slice(start, len(shapes))


def _sum_over_alignments(parts: Sequence[Tensor]) -> Tensor:
    """Losses `[n]` of n lattices `[T, U + 1, 2]` of similar sizes."""
    if parts[0].dtype == torch.float64:  # torchaudio supports float32 only
        return torch.stack([sum_by_diagonals(part) for part in parts])
    most = [max(part.shape[axis] for part in parts) for axis in (0, 1)]
    padded = parts[0][None]  # a single lattice may be large and is not copied
    if len(parts) > 1:
        missing = [(most[1] - part.shape[1], most[0] - part.shape[0]) for part in parts]
        padded = torch.stack([F.pad(part, (0, 0, 0, u, 0, t)) for part, (u, t) in zip(parts, missing, strict=True)])
    sizes = to_device([part.shape[:2] for part in parts], padded.device, torch.int32)
    targets = torch.ones(len(parts), most[1] - 1, dtype=torch.int32, device=padded.device)
    return _RNNTLoss.apply(padded, targets, sizes[:, 0].contiguous(), sizes[:, 1] - 1)


class _RNNTLoss(torch.autograd.Function):
    """torchaudio's `rnnt_loss` with corrected gradients.

    Its float32 sums drift along a lattice with many paths: for 2,000 frames and 200 random labels, the gradients have
    an error of 0.7 %. An alignment takes one blank per frame, so the probabilities of a frame's blanks sum to 1;
    division by their sum reduces the error to 0.1 %.
    """

    @staticmethod
    def forward(ctx: Any, lattices: Tensor, targets: Tensor, num_frames: Tensor, num_labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = lattices.detach().requires_grad_()
            losses = torchaudio.functional.rnnt_loss(
                leaf, targets, num_frames, num_labels, blank=BLANK, reduction="none", fused_log_softmax=False
            )
            [grad] = torch.autograd.grad(losses.sum(), leaf)
        blanks = -grad[..., BLANK].sum(dim=-1)[..., None, None]
        ctx.save_for_backward(grad.div_(torch.where(blanks == 0, 1.0, blanks)))  # no blanks in padding
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0][:, None, None, None], None, None, None


def sum_by_diagonals(lattice: Tensor) -> Tensor:
    """Loss of one lattice `[T, U + 1, 2]` in plain torch, in any dtype. Source: Graves 2012, equation 16.

    Cell (t, u) is reached from (t - 1, u) by a blank and from (t, u - 1) by a label: both are on the previous diagonal.
    """
    blank, label = lattice.unbind(-1)
    frames, states = blank.shape
    state = torch.arange(states, device=lattice.device)
    alpha = torch.where(state == 0, 0.0, IMPOSSIBLE).to(lattice.dtype)
    for diagonal in range(1, frames + states - 1):
        frame = diagonal - 1 - state  # of every state on the previous diagonal
        outside = (frame < 0) | (frame >= frames)
        frame = frame.clamp(0, frames - 1)
        stay = (alpha + blank[frame, state]).masked_fill(outside, IMPOSSIBLE)
        emit = (alpha + label[frame, state]).masked_fill(outside, IMPOSSIBLE)
        alpha = torch.logaddexp(stay, F.pad(emit[:-1], (1, 0), value=IMPOSSIBLE))
    return -(alpha[-1] + blank[-1, -1])
