"""Loss of the token-and-duration transducer (TDT), in the memory of the plain transducer loss.

An arc at cell (t, u) of the lattice is a token and a duration d, whose probabilities come from two softmaxes over the
joint network's outputs: V tokens, then D durations. A label leads to (t + d, u + 1); a blank, which must have d > 0,
leads to (t + d, u). An alignment ends with a blank from (t, U) to t + d = T exactly; no other arc may reach T.

The loss needs 2 + D numbers per cell: the log-probabilities of the blank, of the next label, and of the durations. They
are computed over slices of time and again in the backward pass, as for `transducer_loss`. The sum over all alignments
proceeds along the lattice's diagonals t + u, since every arc leads to a later diagonal. A diagonal is computed at once
for all segments of similar size. On a GPU, `kernels.py` does the same in two kernels.

Source: Xu et al. 2023, arXiv 2304.06795, sections 3.1 (the lattice) and 3.3 (under-normalised tokens).

Shapes: N segments, T_s frames and U_s labels of segment s (T and U of a single one), J joint width, V vocabulary, D
durations, n lattices that are padded to one size, K diagonals, W states per diagonal. Label 0 is the blank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bestrq.decoding.tdt_search import check_durations
from bestrq.recognition.losses.backend import use_kernels
from bestrq.recognition.losses.lattices import IMPOSSIBLE, Lattices
from bestrq.recognition.losses.transducer import ArcScores, padding_groups

TOKENS = 2
"""arcs of a cell before its durations: blank, next label"""
WASTE = 2.0
"""upper bound of padded cells per used cell: larger values take more memory, smaller ones more steps"""


def tdt_loss(
    encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor, lattices: Lattices, durations: Sequence[int],
    slice_bytes: int, sigma: float = 0.0,
) -> Tensor:  # fmt: skip
    """Negative log-probability of every segment's labels in nats, float32 `[N]` (float64 for float64).

    In addition to the slices, about 3 + D numbers per cell are kept, and 2 (2 + D) more while gradients are computed.

    Args:
        encoded: `[sum T_s, J]`, encoder side of the joint network, concatenated over the segments.
        predicted: `[sum (U_s + 1), J]`, prediction side, in the same dtype.
        weight, bias: `[V + D, J]` and `[V + D]`, output layer of the joint network, tokens first, in the same dtype.
        durations: frames of every duration output, increasing from 0 and 1.
        slice_bytes: memory of a slice.
        sigma: nats subtracted from every token's log-probability, which favours few tokens and long durations; 0.05
            in the paper. It is part of the loss value.

    Raises:
        UserError: `slice_bytes` is too small for a single frame, or `durations` are invalid: see `check_durations`.
    """
    check_durations(durations)
    arcs = ArcScores.apply(encoded, predicted, weight, bias, lattices, slice_bytes, len(durations))
    return sum_over_durations(arcs, lattices, durations, sigma)


def sum_over_durations(arcs: Tensor, lattices: Lattices, durations: Sequence[int], sigma: float = 0.0) -> Tensor:
    """Negative log of the total probability of all alignments, `[N]`, from the log-probabilities (blank, next label,
    durations) of all cells, `[cells, 2 + D]`; see `tdt_loss`."""
    if use_kernels(arcs):
        from bestrq.recognition.losses.kernels import Alignments

        return Alignments.apply(arcs, lattices, tuple(durations), sigma)
    return _Alignments.apply(arcs, lattices, tuple(durations), sigma)


class _Alignments(torch.autograd.Function):
    """Sum over all alignments, from the end of the lattices to the start; its gradients, the negative posterior
    probabilities of the arcs, are computed from the start to the end."""

    @staticmethod
    def forward(ctx: Any, arcs: Tensor, lattices: Lattices, durations: tuple[int, ...], sigma: float) -> Tensor:
        ctx.lattices, ctx.durations, ctx.sigma = lattices, durations, sigma
        losses = arcs.new_empty(len(lattices.labels))
        backward_scores = []
        for segments in _groups(lattices):
            by_diagonal = _arrange_by_diagonal(arcs, lattices, segments, durations, sigma)
            backward_scores.append(_backward_scores(by_diagonal, lattices, segments, durations))
            losses[segments] = -backward_scores[-1][0, :, 0]
        ctx.save_for_backward(arcs, *backward_scores)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arcs, *backward_scores = ctx.saved_tensors
        grad_arcs = torch.empty_like(arcs)
        for segments, scores in zip(_groups(ctx.lattices), backward_scores, strict=True):
            by_diagonal = _arrange_by_diagonal(arcs, ctx.lattices, segments, ctx.durations, ctx.sigma)
            _posteriors_(by_diagonal, scores, ctx.durations, -grads[0][segments])
            for position, segment in enumerate(segments):
                cells = _lattice_view(by_diagonal, position, ctx.lattices, segment)
                index = _band_index(ctx.lattices, segment, arcs.shape[1])
                if index is not None:
                    cells = cells.gather(1, index)
                _segment_arcs(grad_arcs, ctx.lattices, segment).copy_(cells)
        return grad_arcs, None, None, None


def _groups(lattices: Lattices) -> list[list[int]]:
    """Segments in groups whose lattices are padded to one size."""
    shapes = [(frames, lattices.num_states(segment), 0) for segment, frames in enumerate(lattices.num_frames)]
    order = sorted(range(len(shapes)), key=shapes.__getitem__)
    return [order[group] for group in padding_groups([shapes[segment] for segment in order], WASTE)]


def _segment_arcs(arcs: Tensor, lattices: Lattices, segment: int) -> Tensor:
    """View of a segment's cells, `[T, states per frame, 2 + D]`."""
    cells = lattices.cells
    first = sum(cells[:segment])
    return arcs[first : first + cells[segment]].view(lattices.num_frames[segment], -1, arcs.shape[1])


def _band_index(lattices: Lattices, segment: int, num_arcs: int) -> Tensor | None:
    """States of every frame's band, once per arc, int64 `[T, states per frame, 2 + D]`; None without bands."""
    band = lattices.band(segment)
    return None if band is None else band[..., None].expand(-1, -1, num_arcs)


def _lattice_view(by_diagonal: Tensor, position: int, lattices: Lattices, segment: int) -> Tensor:
    """View `[T, U + 1, 2 + D]` of one lattice in `[K, 2 + D, n, W]`: cell (t, u) is at diagonal t + u, state u."""
    diagonal, arc, lattice, _ = by_diagonal.stride()
    size = (lattices.num_frames[segment], lattices.num_states(segment), by_diagonal.shape[1])
    return by_diagonal.as_strided(size, (diagonal, diagonal + 1, arc), position * lattice)


def _arrange_by_diagonal(
    arcs: Tensor, lattices: Lattices, segments: Sequence[int], durations: Sequence[int], sigma: float
) -> Tensor:
    """Arcs of n lattices, arranged by diagonal: `[K, 2 + D, n, W]`, impossible outside the lattices."""
    most = max(lattices.num_states(segment) for segment in segments)
    diagonals = max(lattices.num_frames[segment] + lattices.num_states(segment) - 1 for segment in segments)
    by_diagonal = arcs.new_full((diagonals, arcs.shape[1], len(segments), most), IMPOSSIBLE)
    for position, segment in enumerate(segments):
        cells = _lattice_view(by_diagonal, position, lattices, segment)
        index = _band_index(lattices, segment, arcs.shape[1])
        part = _segment_arcs(arcs, lattices, segment)
        if index is None:
            cells.copy_(part)
        else:
            cells.scatter_(1, index, part)
        for column, duration in enumerate(durations, start=TOKENS):
            # No arc from a state with labels left may reach T; that of the last label would lead to the end cell.
            cells[max(lattices.num_frames[segment] - duration, 0) :, :-1, column] = IMPOSSIBLE
    by_diagonal[:, :TOKENS] -= sigma
    return by_diagonal


def _target_diagonals(durations: Sequence[int], diagonals: int, device: torch.device) -> tuple[Sequence[Tensor], ...]:
    """Diagonals that the blanks, int64 `[D - 1]`, and the labels, int64 `[D]`, of every diagonal lead to."""
    rows = torch.arange(diagonals, device=device)[:, None] + torch.tensor(durations, device=device)
    return rows[:, 1:].unbind(), (rows + 1).unbind()


def _paths(arcs: Tensor, scores: Tensor, blank_rows: Tensor, label_rows: Tensor) -> Tensor:
    """Log-probabilities `[2 D - 1, n, W]` of all paths to the end that start with each arc of a diagonal: blanks, then
    labels."""
    blanks = scores.index_select(0, blank_rows)[..., :-1] + arcs[TOKENS + 1 :]
    labels = scores.index_select(0, label_rows)[..., 1:] + arcs[TOKENS:]
    return torch.cat((blanks.add_(arcs[0]), labels.add_(arcs[1])))


def _backward_scores(
    by_diagonal: Tensor, lattices: Lattices, segments: Sequence[int], durations: Sequence[int]
) -> Tensor:
    """Log-probabilities of all paths from each cell to the end, by diagonal: `[K + longest duration + 1, n, W + 1]`,
    padded by the cells beyond the lattice that arcs may lead to."""
    diagonals, _, num_lattices, most = by_diagonal.shape
    scores = by_diagonal.new_full((diagonals + durations[-1] + 1, num_lattices, most + 1), IMPOSSIBLE)
    for position, segment in enumerate(segments):
        labels = lattices.num_states(segment) - 1
        scores[lattices.num_frames[segment] + labels, position, labels] = 0.0
    rows = zip(*_target_diagonals(durations, diagonals, by_diagonal.device), strict=True)
    for diagonal, (blank_rows, label_rows) in reversed(list(enumerate(rows))):
        paths = _paths(by_diagonal[diagonal], scores, blank_rows, label_rows)
        cells = scores[diagonal, :, :-1]
        torch.maximum(cells, paths.logsumexp(dim=0), out=cells)  # keeps the end cell of a shorter lattice
    return scores


def _posteriors_(by_diagonal: Tensor, scores: Tensor, durations: Sequence[int], scale: Tensor) -> None:
    """Overwrite the log-probability of every arc with its posterior probability times `scale` `[n]`.

    The posterior of a cell is divided among its arcs by their shares of the cell's backward score. Shares sum to 1
    despite rounding, so that long lattices lose no accuracy.
    """
    posterior = torch.zeros_like(scores)
    posterior[0, :, 0] = scale
    rows = zip(*_target_diagonals(durations, len(by_diagonal), by_diagonal.device), strict=True)
    for arcs, cells, (blank_rows, label_rows) in zip(by_diagonal, posterior, rows, strict=False):
        paths = _paths(arcs, scores, blank_rows, label_rows).softmax(dim=0).mul_(cells[:, :-1])
        blanks, labels = paths.split((len(durations) - 1, len(durations)))
        posterior[..., :-1].index_add_(0, blank_rows, blanks)
        posterior[..., 1:].index_add_(0, label_rows, labels)
        arcs[0] = blanks.sum(dim=0)
        arcs[1] = labels.sum(dim=0)
        arcs[TOKENS:] = labels
        arcs[TOKENS + 1 :] += blanks
