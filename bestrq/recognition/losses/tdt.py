"""The loss of the token-and-duration transducer (TDT), in the memory of the plain one.

An arc at cell (t, u) of the lattice is a token and a duration d, whose probabilities come from two softmaxes over the
joint network's outputs: V tokens, then D durations. A label goes to (t + d, u + 1), a blank to (t + d, u), where it
must have d > 0. An alignment ends with a blank from (t, U) to t + d = T exactly; no other arc may reach T.

Of a cell the loss needs 2 + D numbers: the log-probabilities of the blank, of the next label, and of the durations.
They are computed over slices of time and once more in the backward pass, as for `transducer_loss`. The sum over all
alignments walks the lattice's diagonals t + u, each at once for all segments of similar size: every arc leads to a
later one.

Source: Xu et al. 2023, arXiv 2304.06795, sections 3.1 (the lattice) and 3.3 (under-normalised tokens).

N segments, T_s frames and U_s labels of segment s, J joint width, V vocabulary, D durations. Label 0 is the blank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bestrq.recognition.losses.lattices import Lattices
from bestrq.recognition.losses.transducer import IMPOSSIBLE, ArcScores, alike
from common.errors import UserError

TOKENS = 2
"""arcs of a cell before its durations: blank, next label"""
WASTE = 2.0
"""how much larger padded lattices may be than what they hold: more takes memory, less takes more steps"""


def check_durations(durations: Sequence[int]) -> None:
    """Refuse durations with which some segment of 1 or more frames has no alignment.

    With 0 and 1 all have one. Of a single frame, labels need the 0 and the last blank needs the 1.

    Raises:
        UserError: they do not begin with 0 and 1, or do not increase.
    """
    increasing = all(before < after for before, after in zip(durations, durations[1:], strict=False))
    if not increasing or list(durations[:2]) != [0, 1]:
        raise UserError(
            f"transducer.durations is {list(durations)}: give increasing numbers of frames that begin with 0 and 1, "
            "such as [0, 1, 2, 3, 4]; without 0 or without 1 a segment of one frame cannot be aligned"
        )


def tdt_loss(
    encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, lattices: Lattices, durations: Sequence[int],
    slice_bytes: int, sigma: float = 0.0,
) -> Tensor:  # fmt: skip
    """Minus the log-probability of every segment's labels, in nats: float32 `[N]` (float64 for float64).

    Beside the slices, a cell keeps about 3 + D numbers, and takes 2 (2 + D) more while its gradients are computed.

    Args:
        encoded: `[sum T_s, J]`, the encoder's part of the joint network's hidden units, segment after segment.
        predicted: `[sum (U_s + 1), J]`, the prediction network's part, in the same dtype.
        weight, bias: `[V + D, J]` and `[V + D]`, of the joint network's output, tokens first, in that dtype too.
        durations: frames of every duration output, increasing from 0 and 1.
        slice_bytes: what the computation of a slice may take.
        sigma: subtracted from every token's log-probability, in nats, so that alignments of few tokens, which are
            those of long durations, weigh more; the paper has 0.05. The loss is larger by it for every token.

    Raises:
        UserError: `slice_bytes` is too small for a single frame, or `durations` leave a segment without alignment.
    """
    check_durations(durations)
    arcs = ArcScores.apply(encoded, predicted, weight, bias, lattices, slice_bytes, len(durations))
    return sum_over_durations(arcs, lattices, durations, sigma)


def sum_over_durations(arcs: Tensor, lattices: Lattices, durations: Sequence[int], sigma: float = 0.0) -> Tensor:
    """Minus the log of the summed probability of all alignments, `[N]`, from log-probabilities (blank, next label,
    durations) of all cells `[cells, 2 + D]`: see `tdt_loss`."""
    return _Alignments.apply(arcs, lattices, tuple(durations), sigma)


class _Alignments(torch.autograd.Function):
    """The sum from the end of the lattices to their start; its gradients, minus the posterior probabilities of arcs,
    from the start to the end."""

    @staticmethod
    def forward(ctx: Any, arcs: Tensor, lattices: Lattices, durations: tuple[int, ...], sigma: float) -> Tensor:
        ctx.lattices, ctx.durations, ctx.sigma = lattices, durations, sigma
        losses = arcs.new_empty(len(lattices.labels))
        remaining = []
        for segments in _groups(lattices):
            by_diagonal = _by_diagonal(arcs, lattices, segments, durations, sigma)
            remaining.append(_remaining(by_diagonal, lattices, segments, durations))
            losses[segments] = -remaining[-1][0, :, 0]
        ctx.save_for_backward(arcs, *remaining)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arcs, *remaining = ctx.saved_tensors
        grad_arcs = torch.empty_like(arcs)
        for segments, one in zip(_groups(ctx.lattices), remaining, strict=True):
            by_diagonal = _by_diagonal(arcs, ctx.lattices, segments, ctx.durations, ctx.sigma)
            _posteriors_(by_diagonal, one, ctx.durations, -grads[0][segments])
            for place, segment in enumerate(segments):
                cells = _cells(by_diagonal, place, ctx.lattices, segment)
                seen = _seen(ctx.lattices, segment, arcs)
                if seen is not None:
                    cells = cells.gather(1, seen)
                _of_segment(grad_arcs, ctx.lattices, segment).copy_(cells)
        return grad_arcs, None, None, None


def _groups(lattices: Lattices) -> list[list[int]]:
    """Segments whose lattices are padded to one size."""
    shapes = [(frames, lattices.num_states(segment), 0) for segment, frames in enumerate(lattices.num_frames)]
    order = sorted(range(len(shapes)), key=shapes.__getitem__)
    return [order[group] for group in alike([shapes[segment] for segment in order], WASTE)]


def _of_segment(arcs: Tensor, lattices: Lattices, segment: int) -> Tensor:
    """The view `[T, W, 2 + D]` of a segment's cells."""
    cells = lattices.cells
    first = sum(cells[:segment])
    return arcs[first : first + cells[segment]].view(lattices.num_frames[segment], -1, arcs.shape[1])


def _seen(lattices: Lattices, segment: int, arcs: Tensor) -> Tensor | None:
    """int64 `[T, W, 2 + D]`: the states that every frame sees, once for every arc; None for all."""
    width = lattices.width(segment)
    if lattices.first_state is None or width == lattices.num_states(segment):
        return None
    seen = lattices.first_state[segment][:, None] + torch.arange(width, device=arcs.device)
    return seen[..., None].expand(-1, -1, arcs.shape[1])


def _cells(by_diagonal: Tensor, place: int, lattices: Lattices, segment: int) -> Tensor:
    """The view `[T, U + 1, 2 + D]` of one lattice in `[K, 2 + D, n, W]`: cell (t, u) is at diagonal t + u, state u."""
    diagonal, arc, lattice, _ = by_diagonal.stride()
    size = (lattices.num_frames[segment], lattices.num_states(segment), by_diagonal.shape[1])
    return by_diagonal.as_strided(size, (diagonal, diagonal + 1, arc), place * lattice)


def _by_diagonal(
    arcs: Tensor, lattices: Lattices, segments: Sequence[int], durations: Sequence[int], sigma: float
) -> Tensor:
    """The arcs of n lattices by their K diagonals, `[K, 2 + D, n, W]`, impossible outside of them; W: most states."""
    most = max(lattices.num_states(segment) for segment in segments)
    diagonals = max(lattices.num_frames[segment] + lattices.num_states(segment) - 1 for segment in segments)
    by_diagonal = arcs.new_full((diagonals, arcs.shape[1], len(segments), most), IMPOSSIBLE)
    for place, segment in enumerate(segments):
        cells, seen = _cells(by_diagonal, place, lattices, segment), _seen(lattices, segment, arcs)
        part = _of_segment(arcs, lattices, segment)
        if seen is None:
            cells.copy_(part)
        else:
            cells.scatter_(1, seen, part)
        for column, duration in enumerate(durations, start=TOKENS):
            # With labels left, what reaches T is lost. Of the last label's arcs, that would pass for the end.
            cells[max(lattices.num_frames[segment] - duration, 0) :, :-1, column] = IMPOSSIBLE
    by_diagonal[:, :TOKENS] -= sigma
    return by_diagonal


def _targets(durations: Sequence[int], diagonals: int, device: torch.device) -> tuple[Sequence[Tensor], ...]:
    """For every diagonal, those to which blanks `[D - 1]` and labels `[D]` lead."""
    rows = torch.arange(diagonals, device=device)[:, None] + torch.tensor(durations, device=device)
    return rows[:, 1:].unbind(), (rows + 1).unbind()


def _paths(arcs: Tensor, remaining: Tensor, blank_rows: Tensor, label_rows: Tensor) -> Tensor:
    """Log-probabilities `[2 D - 1, n, W]` of a diagonal's arcs with all that may follow: blanks, then labels."""
    blanks = remaining.index_select(0, blank_rows)[..., :-1] + arcs[TOKENS + 1 :]
    labels = remaining.index_select(0, label_rows)[..., 1:] + arcs[TOKENS:]
    return torch.cat((blanks.add_(arcs[0]), labels.add_(arcs[1])))


def _remaining(by_diagonal: Tensor, lattices: Lattices, segments: Sequence[int], durations: Sequence[int]) -> Tensor:
    """Log-probabilities of all ways from a cell to the end, by diagonal: `[K + longest + 1, n, W + 1]`, padded by
    what arcs may reach beyond the lattice."""
    diagonals, _, num_lattices, most = by_diagonal.shape
    remaining = by_diagonal.new_full((diagonals + durations[-1] + 1, num_lattices, most + 1), IMPOSSIBLE)
    for place, segment in enumerate(segments):
        labels = lattices.num_states(segment) - 1
        remaining[lattices.num_frames[segment] + labels, place, labels] = 0.0
    rows = zip(*_targets(durations, diagonals, by_diagonal.device), strict=True)
    for diagonal, (blank_rows, label_rows) in reversed(list(enumerate(rows))):
        paths = _paths(by_diagonal[diagonal], remaining, blank_rows, label_rows)
        cells = remaining[diagonal, :, :-1]
        torch.maximum(cells, paths.logsumexp(dim=0), out=cells)  # a shorter lattice's end is kept
    return remaining


def _posteriors_(by_diagonal: Tensor, remaining: Tensor, durations: Sequence[int], scale: Tensor) -> None:
    """Write the posterior probability of every arc, times `scale` `[n]`, over its log-probability.

    A cell's posterior goes to its arcs by their shares of what remains. Shares add up to 1 whatever the rounding, so
    that long lattices lose no accuracy.
    """
    posterior = torch.zeros_like(remaining)
    posterior[0, :, 0] = scale
    rows = zip(*_targets(durations, len(by_diagonal), by_diagonal.device), strict=True)
    for arcs, cells, (blank_rows, label_rows) in zip(by_diagonal, posterior, rows, strict=False):
        paths = _paths(arcs, remaining, blank_rows, label_rows).softmax(dim=0).mul_(cells[:, :-1])
        blanks, labels = paths.split((len(durations) - 1, len(durations)))
        posterior[..., :-1].index_add_(0, blank_rows, blanks)
        posterior[..., 1:].index_add_(0, label_rows, labels)
        arcs[0] = blanks.sum(dim=0)
        arcs[1] = labels.sum(dim=0)
        arcs[TOKENS:] = labels
        arcs[TOKENS + 1 :] += blanks
