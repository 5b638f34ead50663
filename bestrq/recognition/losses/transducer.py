"""The transducer loss without ever holding the joint network's outputs of a whole lattice.

Of the V outputs at a cell (t, u) of the lattice the loss needs two numbers: the log-probability of the blank, and that
of the next label. They are computed over slices of time, as many frames as a byte budget allows, and once more in the
backward pass: no `[T, U, V]` tensor exists. The sum over all alignments is then torchaudio's `rnnt_loss` for a
vocabulary of two. Segments have their own lengths: the joint network sees no padding, neither in time nor in labels.

Source: Graves 2012, arXiv 1211.3711; FastEmit: Yu et al. 2021, arXiv 2010.11148.

N segments, T_s frames and U_s labels of segment s, J joint width, V vocabulary. Label 0 is the blank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor

from bestrq.decoding.tokens import BLANK
from bestrq.recognition.losses.lattices import Lattices
from common.errors import UserError

IMPOSSIBLE = -1e30
"""log-probability of an arc outside a band; minus infinity would make NaN of gradients"""

CPU_SLICE_BYTES = 64 * 2**20
"""upper bound of a slice on the CPU. Slices of 8 MiB, which fit into the cache, take 6 % less processor time, but every
operation on a slice is a barrier for all threads: with another process on a core they took 3 times as long"""


def bytes_of_cell(joint_dim: int, vocab_size: int, itemsize: int) -> int:
    """Bytes that a cell takes at the peak of the backward pass, while its slice is computed."""
    # Hidden units, their gradient, and that before tanh or wide; logits as computed, at least float32, and gradient.
    wide = max(itemsize, 4)
    return joint_dim * (2 * itemsize + wide) + 2 * vocab_size * wide + (vocab_size * itemsize if itemsize < wide else 0)


def frames_of_slice(lattices: Lattices, joint_dim: int, vocab_size: int, itemsize: int, budget: int) -> list[int]:
    """Frames of every segment that may be computed at once, 1 or more.

    Raises:
        UserError: a single frame takes more than `budget` bytes; the message has the smallest budget that works.
    """
    cell = bytes_of_cell(joint_dim, vocab_size, itemsize)
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
    """Some frames of one segment's lattice."""

    frames: slice
    """of the frames of all segments"""
    states: slice
    """of the states of all segments: those that all frames see; with bands all of this segment"""
    cells: slice
    """of the cells of all segments, a segment's frame after frame"""
    labels: Tensor
    """int64 [W], or with bands [t, W]: the label behind every state; 0 behind the last, which has none"""
    seen: Tensor | None
    """int64 [t, W]: the states of every frame's band; None without bands"""

    def hidden(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Hidden units `[t, W, J]`."""
        states = predicted[self.states]
        return (encoded[self.frames, None] + (states if self.seen is None else states[self.seen])).tanh_()

    def narrowed(self, first: int, stop: int) -> "_Slice":
        """Of the W states of every frame those in first .. stop - 1; `cells` stay as they were."""
        if self.seen is not None:
            return replace(self, labels=self.labels[:, first:stop], seen=self.seen[:, first:stop])
        states = slice(self.states.start + first, self.states.start + stop)
        return replace(self, labels=self.labels[first:stop], states=states)


def _slices(lattices: Lattices, weight: Tensor, budget: int) -> Iterator[_Slice]:
    vocab_size, joint_dim = weight.shape
    frame = state = cell = 0
    sizes = frames_of_slice(lattices, joint_dim, vocab_size, weight.element_size(), budget)
    for segment, (frames, size) in enumerate(zip(lattices.num_frames, sizes, strict=True)):
        states, width = lattices.num_states(segment), lattices.width(segment)
        size = min(size, max(1, size * CPU_SLICE_BYTES // budget)) if weight.device.type == "cpu" else size
        labels = F.pad(lattices.labels[segment], (0, 1), value=BLANK)
        for first in range(0, frames, size):
            stop = min(first + size, frames)
            seen = None
            if lattices.first_state is not None and width < states:
                seen = lattices.first_state[segment][first:stop, None] + torch.arange(width, device=labels.device)
            cells, behind = slice(cell + first * width, cell + stop * width), labels if seen is None else labels[seen]
            yield _Slice(slice(frame + first, frame + stop), slice(state, state + states), cells, behind, seen)
        frame, state, cell = frame + frames, state + states, cell + frames * width


def _passed(flow: Tensor) -> Tensor:
    """First and past-the-last state, int64 `[2]`, that a slice's alignments pass through, from the gradients `[t, W]`
    of its cells. In every frame, the gradients of all other states sum to less than a frame's rounding error.
    """
    num_states = flow.shape[1]
    tails = torch.stack((flow, flow.flip(1))).cumsum(dim=2)
    least = tails[0, :, -1].amax() * (torch.finfo(flow.dtype).eps / 2)  # on either side
    # Not "tails >= least": a NaN must reach the gradients, where the step looks for it.
    outside = (tails < least).all(dim=1).sum(dim=1)
    first, stop = outside[0], num_states - outside[1]
    eights = (stop - first + 7) // 8 * 8  # oneDNN makes and keeps code for every size
    return torch.stack((first, (first + eights).clamp(max=num_states)))


class ArcScores(torch.autograd.Function):
    """Joint network and log-softmax; of a cell's tokens, only the log-probabilities of blank and next label are kept,
    and all of its D durations, the last outputs, which have a softmax of their own (none here: see `tdt_loss`)."""

    @staticmethod
    def forward(
        ctx: Any, encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, lattices: Lattices, budget: int,
        num_durations: int = 0,
    ) -> Tensor:  # fmt: skip
        """`[cells, 2 + D]`, at least float32."""
        ctx.lattices, ctx.budget, ctx.num_tokens = lattices, budget, len(weight) - num_durations
        wide = torch.promote_types(encoded.dtype, torch.float32)
        arcs = encoded.new_empty(sum(lattices.cells), 2 + num_durations, dtype=wide)
        for part in _slices(lattices, weight, budget):
            logits = F.linear(part.hidden(encoded, predicted), weight, bias).to(wide)
            if num_durations:
                arcs[part.cells, 2:] = logits[..., ctx.num_tokens :].log_softmax(dim=-1).flatten(0, 1)
            log_probs = logits[..., : ctx.num_tokens].log_softmax(dim=-1)
            arcs[part.cells, 0] = log_probs[..., BLANK].flatten()
            # Behind the last label there is none: its arc is never used, but must be finite.
            arcs[part.cells, 1] = log_probs.gather(-1, part.labels.expand(log_probs.shape[:2])[..., None]).flatten()
            del logits, log_probs  # the next slice would come beside them
        ctx.save_for_backward(encoded, predicted, weight, bias)
        return arcs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (encoded, predicted, weight, bias), wide = ctx.saved_tensors, grads[0].dtype
        totals = [torch.zeros_like(tensor, dtype=wide) for tensor in ctx.saved_tensors]
        grad_encoded, grad_predicted, grad_weight, grad_bias = totals
        parts = list(_slices(ctx.lattices, weight, ctx.budget))
        grad_of = [grads[0][part.cells].view(-1, part.labels.shape[-1], grads[0].shape[1]) for part in parts]
        # All of them in one transfer from the device, which would wait for each otherwise.
        passed = [_passed(grad[..., :2].abs().sum(dim=-1)) for grad in grad_of]
        spans = torch.stack(passed).tolist() if passed else []
        for part, grad, (first, stop) in zip(parts, grad_of, spans, strict=True):
            grad, part = grad[:, first:stop], part.narrowed(first, stop)
            hidden = part.hidden(encoded, predicted)
            grad_logits = F.linear(hidden, weight, bias).to(wide)
            _log_softmax_backward_(grad_logits, grad, part.labels, ctx.num_tokens)
            grad_bias += grad_logits.sum(dim=(0, 1))
            flat = grad_logits.flatten(0, 1).to(hidden.dtype)
            grad_weight += flat.mT @ hidden.flatten(0, 1)
            grad_hidden = torch.ops.aten.tanh_backward((flat @ weight).view_as(hidden), hidden)
            grad_encoded[part.frames] += grad_hidden.sum(dim=1, dtype=wide)
            if part.seen is None:
                grad_predicted[part.states] += grad_hidden.sum(dim=0, dtype=wide)
            else:
                grad_predicted[part.states].index_add_(0, part.seen.flatten(), grad_hidden.flatten(0, 1).to(wide))
            del hidden, grad_logits, flat, grad_hidden  # the next slice would come beside them
        return *(total.to(x.dtype) for total, x in zip(totals, ctx.saved_tensors, strict=True)), None, None, None


def _log_softmax_backward_(logits: Tensor, grad: Tensor, labels: Tensor, num_tokens: int) -> None:
    """Write over logits `[t, W, V + D]` their gradients, from those of arcs `[t, W, 2 + D]`."""
    # d log p(k) / d logits = onehot(k) - softmax
    tokens, durations = logits.split((num_tokens, logits.shape[-1] - num_tokens), dim=-1)
    grad_label = grad[..., 1:2] * (labels != BLANK)[..., None]
    torch.mul(tokens.softmax(dim=-1), -(grad[..., :1] + grad_label), out=tokens)
    tokens[..., :1] += grad[..., :1]  # BLANK
    tokens.scatter_add_(-1, labels.expand(grad.shape[:2])[..., None], grad_label)
    if durations.shape[-1]:
        torch.mul(durations.softmax(dim=-1), -grad[..., 2:].sum(dim=-1, keepdim=True), out=durations)
        durations += grad[..., 2:]


def transducer_loss(
    encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, lattices: Lattices, slice_bytes: int,
    fast_emit: float = 0.0,
) -> Tensor:  # fmt: skip
    """Minus the log-probability of every segment's labels, in nats: float32 `[N]` (float64 for float64).

    Beside the slices, a cell takes about 36 bytes (45 in lattices padded to one size) while alignments are summed, and
    8 of them, the gradients of its two log-probabilities, until the backward pass.

    Args:
        encoded: `[sum T_s, J]`, the encoder's part of the joint network's hidden units, segment after segment.
        predicted: `[sum (U_s + 1), J]`, the prediction network's part, in the same dtype.
        weight, bias: `[V, J]` and `[V]`, of the joint network's output, in that dtype too.
        slice_bytes: what the computation of a slice may take.
        fast_emit: the share by which gradients of labels are made larger, so that the model emits earlier. The loss's
            value stays as it is.

    Raises:
        UserError: `slice_bytes` is too small for a single frame; naming the smallest that works.
    """
    arcs = ArcScores.apply(encoded, predicted, weight, bias, lattices, slice_bytes)
    return sum_over_alignments(arcs, lattices, fast_emit)


def sum_over_alignments(arcs: Tensor, lattices: Lattices, fast_emit: float = 0.0) -> Tensor:
    """Minus the log of the summed probability of all alignments, `[N]`, from log-probabilities (blank, next label)
    of all cells `[cells, 2]`: see `transducer_loss`."""
    if fast_emit and arcs.requires_grad:
        arcs = arcs.view_as(arcs)  # the hook is of this use alone
        arcs.register_hook(lambda grad: grad * grad.new_tensor([1.0, 1.0 + fast_emit]))
    parts = [_whole_lattice(part, lattices, segment) for segment, part in enumerate(arcs.split(lattices.cells))]
    losses = [arcs[:0, 0]]  # of no segment: what keeps the graph, which DDP needs
    order = sorted(range(len(parts)), key=lambda segment: parts[segment].shape)
    for group in alike([parts[segment].shape for segment in order]):
        losses.append(_sum_over_alignments([parts[segment] for segment in order[group]]))
    return torch.cat(losses)[torch.tensor(order, dtype=torch.int64).argsort().to(arcs.device)]


def _whole_lattice(part: Tensor, lattices: Lattices, segment: int) -> Tensor:
    """`[T, U + 1, 2]` of one segment; outside of its band, nothing is possible."""
    frames, states, width = lattices.num_frames[segment], lattices.num_states(segment), lattices.width(segment)
    part = part.view(frames, width, 2)
    if lattices.first_state is None or width == states:
        return part
    seen = lattices.first_state[segment][:, None] + torch.arange(width, device=part.device)
    whole = part.new_full((frames, states, 2), IMPOSSIBLE)
    return whole.scatter(1, seen[..., None].expand(-1, -1, 2), part)


def alike(shapes: Sequence[Sequence[int]], waste: float = 1.25) -> Iterator[slice]:
    """Runs of sorted shapes that may be padded to one, which then is at most `waste` times their sum."""
    begin, most_states, used = 0, 0, 0
    for end, (frames, states, _) in enumerate(shapes):
        most_states, used = max(most_states, states), used + frames * states
        if frames * most_states * (end + 1 - begin) > waste * used:
            yield slice(begin, end)
            begin, most_states, used = end, states, frames * states
    if shapes:
        yield slice(begin, len(shapes))


def _sum_over_alignments(parts: Sequence[Tensor]) -> Tensor:
    """`[n]` for n lattices `[T, U + 1, 2]` of similar sizes."""
    if parts[0].dtype == torch.float64:  # torchaudio knows float32 alone
        return torch.stack([sum_by_diagonals(part) for part in parts])
    most = [max(part.shape[axis] for part in parts) for axis in (0, 1)]
    padded = parts[0][None]  # a lattice alone is not copied: it may be long
    if len(parts) > 1:
        rest = [(most[1] - part.shape[1], most[0] - part.shape[0]) for part in parts]
        padded = torch.stack([F.pad(part, (0, 0, 0, u, 0, t)) for part, (u, t) in zip(parts, rest, strict=True)])
    sizes = torch.tensor([part.shape[:2] for part in parts], dtype=torch.int32).to(padded.device)
    targets = torch.ones(len(parts), most[1] - 1, dtype=torch.int32, device=padded.device)
    return _RNNTLoss.apply(padded, targets, sizes[:, 0].contiguous(), sizes[:, 1] - 1)


class _RNNTLoss(torch.autograd.Function):
    """torchaudio's, with its gradients set right.

    Its float32 sums drift along a lattice whose paths are many: for 2,000 frames and 200 labels at random, gradients
    were 0.7 % off. An alignment takes one blank of every frame, so a frame's blanks have probabilities that sum to 1:
    divided by their sum, 0.1 % is left.
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
        ctx.save_for_backward(grad.div_(torch.where(blanks == 0, 1.0, blanks)))  # padding has none
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0][:, None, None, None], None, None, None


def sum_by_diagonals(lattice: Tensor) -> Tensor:
    """The same for one lattice `[T, U + 1, 2]` in plain torch: Graves 2012, equation 16.

    Cell (t, u) is entered from (t - 1, u) by a blank and from (t, u - 1) by a label: both are on the diagonal before.
    """
    blank, label = lattice.unbind(-1)
    frames, states = blank.shape
    state = torch.arange(states, device=lattice.device)
    alpha = torch.where(state == 0, 0.0, IMPOSSIBLE).to(lattice.dtype)
    for diagonal in range(1, frames + states - 1):
        frame = diagonal - 1 - state  # of the states on the diagonal before
        outside = (frame < 0) | (frame >= frames)
        frame = frame.clamp(0, frames - 1)
        stay = (alpha + blank[frame, state]).masked_fill(outside, IMPOSSIBLE)
        emit = (alpha + label[frame, state]).masked_fill(outside, IMPOSSIBLE)
        alpha = torch.logaddexp(stay, F.pad(emit[:-1], (1, 0), value=IMPOSSIBLE))
    return -(alpha[-1] + blank[-1, -1])
