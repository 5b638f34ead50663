"""Sum over all alignments of transducer lattices on a GPU: one Triton kernel forward and one backward.

One program per lattice passes over its diagonals t + u, whose cells are independent of each other; a barrier separates
consecutive diagonals. Arcs, scores and gradients have the layout of `Lattices`, bands included, and nothing is padded.
No atomic operation is used, so results are the same in every run, and the host never waits.

The same kernels serve the token-and-duration transducer (`tdt.py`, which has the definition of the lattice and is the
reference) and the plain transducer, whose labels last 0 frames and whose blanks last 1.

Shapes: N segments, T frames and U labels of one, S = U + 1 states, W states per frame, D durations, A arcs per cell.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bestrq.recognition.losses.lattices import IMPOSSIBLE, Lattices, to_device

LARGEST_BLOCK = 1024
"""most cells of a diagonal that are computed at once"""
PLAIN = (0, 1)
"""durations of the plain transducer: of every label, of every blank"""

_IMPOSSIBLE = tl.constexpr(IMPOSSIBLE)
_LOWEST = tl.constexpr(-3e38)


@triton.jit
def _locate(layout, first_state, t, u, BANDED: tl.constexpr):
    """Cell (t, u) among all cells, and whether it exists; `layout`: see `_layout`."""
    cell, frame, frames, states, width = layout
    exists = (t >= 0) & (t < frames) & (u >= 0) & (u < states)
    column = u
    if BANDED:
        column = u - tl.load(first_state + frame + t, mask=exists & (width < states), other=0)
        exists = exists & (column >= 0) & (column < width)
    return cell + t.to(tl.int64) * width + column, exists


@triton.jit
def _read_layout(layouts, lattice):
    row = layouts + 5 * lattice
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2).to(tl.int32),
        tl.load(row + 3).to(tl.int32),
        tl.load(row + 4).to(tl.int32),
    )


@triton.jit
def _span(arcs, cell, exists, j: tl.constexpr, A: tl.constexpr):
    """Log-probability of duration j; 0 for the plain transducer, which has no such outputs."""
    if A == 2:
        return tl.zeros(cell.shape, arcs.dtype.element_ty)
    return tl.load(arcs + cell * A + 2 + j, mask=exists, other=0.0)


@triton.jit
def _rest(scores, layout, first_state, t, u, exists, LAST: tl.constexpr, BANDED: tl.constexpr):
    """Score of cell (t, u), to which an arc from an existing cell leads. Only a blank (`LAST`) reaches the end."""
    cell, inside = _locate(layout, first_state, t, u, BANDED)
    score = tl.load(scores + cell, mask=exists & inside, other=_IMPOSSIBLE)
    if LAST:
        score = tl.where((t == layout[2]) & (u == layout[3] - 1), 0.0, score)
    return score


@triton.jit
def _add(highest, total, path):
    """Running maximum, and sum of exponentials relative to it, with one more path."""
    higher = tl.where(path > highest, path, highest)
    return higher, total * tl.exp(highest - higher) + tl.exp(path - higher)


@triton.jit
def scores_kernel(
    arcs, first_state, layouts, scores, residuals, losses,
    DURATIONS: tl.constexpr, SIGMA: tl.constexpr, A: tl.constexpr, BANDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-probability of all paths from each cell to the end, from the last diagonal to the first.

    `residuals` is the rounding error of a score: without it, the shares of a cell's arcs would not sum to 1, and
    posteriors would drift along a lattice.
    """
    lattice = tl.program_id(0)
    layout = _read_layout(layouts, lattice)
    frames, states = layout[2], layout[3]
    for back in range(frames + states - 1):
        diagonal = frames + states - 2 - back
        for start in range(tl.maximum(diagonal - frames + 1, 0), tl.minimum(diagonal, states - 1) + 1, BLOCK):
            u = start + tl.arange(0, BLOCK)
            t = diagonal - u
            cell, exists = _locate(layout, first_state, t, u, BANDED)
            blank = tl.load(arcs + cell * A, mask=exists, other=0.0) - SIGMA
            label = tl.load(arcs + cell * A + 1, mask=exists, other=0.0) - SIGMA
            highest = tl.full([BLOCK], _LOWEST, arcs.dtype.element_ty)
            total = tl.zeros([BLOCK], arcs.dtype.element_ty)
            for j in tl.static_range(len(DURATIONS)):
                span = _span(arcs, cell, exists, j, A)
                if DURATIONS[j] > 0:
                    rest = _rest(scores, layout, first_state, t + DURATIONS[j], u, exists, True, BANDED)
                    highest, total = _add(highest, total, rest + span + blank)
                if A > 2 or DURATIONS[j] == 0:
                    rest = _rest(scores, layout, first_state, t + DURATIONS[j], u + 1, exists, False, BANDED)
                    highest, total = _add(highest, total, rest + span + label)
            score = highest + tl.log(total)
            residual = highest - score + tl.log(total)
            # Not a maximum, which would drop a NaN: the training step checks for it.
            residual = tl.where(score < _IMPOSSIBLE, 0.0, residual)
            score = tl.where(score < _IMPOSSIBLE, _IMPOSSIBLE, score)
            tl.store(scores + cell, score, mask=exists)
            tl.store(residuals + cell, residual, mask=exists)
            tl.store(losses + lattice + tl.zeros([BLOCK], tl.int64), -score, mask=exists & (t == 0) & (u == 0))
        tl.debug_barrier()


@triton.jit
def _arrivals(
    arcs, scores, residuals, posteriors, layout, first_state, t, u, exists, score, TOKEN: tl.constexpr,
    j: tl.constexpr, SIGMA: tl.constexpr, A: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """Posterior probability that arrives at a cell of this score by one arc from cell (t, u)."""
    cell, inside = _locate(layout, first_state, t, u, BANDED)
    inside = inside & exists
    token = tl.load(arcs + cell * A + TOKEN, mask=inside, other=0.0) - SIGMA
    path = score + _span(arcs, cell, inside, j, A) + token
    rest = tl.load(scores + cell, mask=inside, other=0.0)
    share = tl.exp(path - rest - tl.load(residuals + cell, mask=inside, other=0.0))
    return tl.where(inside, share * tl.load(posteriors + cell, mask=inside, other=0.0), 0.0)


@triton.jit
def posteriors_kernel(
    arcs, first_state, layouts, scores, residuals, scale, posteriors, grads,
    DURATIONS: tl.constexpr, SIGMA: tl.constexpr, A: tl.constexpr, BANDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Negative posterior probability of every cell and arc times `scale`, from the first diagonal to the last."""
    lattice = tl.program_id(0)
    layout = _read_layout(layouts, lattice)
    frames, states = layout[2], layout[3]
    whole = -tl.load(scale + lattice)
    for diagonal in range(frames + states - 1):
        for start in range(tl.maximum(diagonal - frames + 1, 0), tl.minimum(diagonal, states - 1) + 1, BLOCK):
            u = start + tl.arange(0, BLOCK)
            t = diagonal - u
            cell, exists = _locate(layout, first_state, t, u, BANDED)
            score = tl.load(scores + cell, mask=exists, other=0.0)
            residual = tl.load(residuals + cell, mask=exists, other=0.0)
            posterior = tl.where((t == 0) & (u == 0), whole, 0.0)
            for j in tl.static_range(len(DURATIONS)):
                before = t - DURATIONS[j]
                if DURATIONS[j] > 0:
                    posterior += _arrivals(
                        arcs, scores, residuals, posteriors, layout, first_state, before, u, exists, score,
                        0, j, SIGMA, A, BANDED,
                    )  # fmt: skip
                if A > 2 or DURATIONS[j] == 0:
                    posterior += _arrivals(
                        arcs, scores, residuals, posteriors, layout, first_state, before, u - 1, exists, score,
                        1, j, SIGMA, A, BANDED,
                    )  # fmt: skip
            tl.store(posteriors + cell, posterior, mask=exists)

            blank = tl.load(arcs + cell * A, mask=exists, other=0.0) - SIGMA
            label = tl.load(arcs + cell * A + 1, mask=exists, other=0.0) - SIGMA
            blanks = tl.zeros([BLOCK], arcs.dtype.element_ty)
            labels = tl.zeros([BLOCK], arcs.dtype.element_ty)
            for j in tl.static_range(len(DURATIONS)):
                taken = tl.zeros([BLOCK], arcs.dtype.element_ty)
                span = _span(arcs, cell, exists, j, A)
                if DURATIONS[j] > 0:
                    rest = _rest(scores, layout, first_state, t + DURATIONS[j], u, exists, True, BANDED)
                    by_blank = posterior * tl.exp(rest + span + blank - score - residual)
                    blanks += by_blank
                    taken += by_blank
                if A > 2 or DURATIONS[j] == 0:
                    rest = _rest(scores, layout, first_state, t + DURATIONS[j], u + 1, exists, False, BANDED)
                    by_label = posterior * tl.exp(rest + span + label - score - residual)
                    labels += by_label
                    taken += by_label
                if A > 2:
                    tl.store(grads + cell * A + 2 + j, taken, mask=exists)
            tl.store(grads + cell * A, blanks, mask=exists)
            tl.store(grads + cell * A + 1, labels, mask=exists)
        tl.debug_barrier()


def _layout(lattices: Lattices, device: torch.device) -> tuple[Tensor, Tensor]:
    """First cell, first frame, T, S and W of every lattice, int64 `[N, 5]`, and the first states of all frames' bands,
    int64 `[sum T]`, or `[0]` without bands."""
    rows, cell, frame = [], 0, 0
    for segment, (frames, cells) in enumerate(zip(lattices.num_frames, lattices.cells, strict=True)):
        rows.append([cell, frame, frames, lattices.num_states(segment), lattices.width(segment)])
        cell, frame = cell + cells, frame + frames
    bands = lattices.first_state
    first = torch.cat(list(bands)) if bands else torch.empty(0, dtype=torch.int64, device=device)
    return to_device(rows, device), first


def launch_options(lattices: Lattices, durations: tuple[int, ...] | None, sigma: float) -> dict[str, Any]:
    """Constants of both kernels; they are compiled once per combination."""
    states = [len(labels) + 1 for labels in lattices.labels]
    longest = max((min(size) for size in zip(lattices.num_frames, states, strict=True)), default=1)
    block = min(max(triton.next_power_of_2(longest), 32), LARGEST_BLOCK)  # cells of a diagonal
    return {
        "DURATIONS": durations or PLAIN,
        "SIGMA": sigma,
        "A": 2 + len(durations or ()),
        "BANDED": lattices.first_state is not None,
        "BLOCK": block,
        "num_warps": max(block // 64, 1),
    }


class Alignments(torch.autograd.Function):
    """Negative log of the total probability of all alignments, `[N]`, from arcs `[cells, A]`.

    `durations` is None for the plain transducer (A = 2). Two numbers per cell are kept for the backward pass besides
    the arcs; one more exists during it.
    """

    @staticmethod
    def forward(
        ctx: Any, arcs: Tensor, lattices: Lattices, durations: tuple[int, ...] | None = None, sigma: float = 0.0
    ) -> Tensor:
        arcs, (layouts, first_state) = arcs.contiguous(), _layout(lattices, arcs.device)
        ctx.options = launch_options(lattices, durations, sigma)
        scores, residuals = arcs.new_empty(2, len(arcs))
        losses = arcs.new_empty(len(lattices.labels))
        if len(losses):
            with torch.cuda.device_of(arcs):
                scores_kernel[len(losses),](arcs, first_state, layouts, scores, residuals, losses, **ctx.options)
        ctx.save_for_backward(arcs, first_state, layouts, scores, residuals)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arcs, first_state, layouts, scores, residuals = ctx.saved_tensors
        posteriors, grad_arcs, scale = torch.empty_like(scores), torch.empty_like(arcs), grads[0].contiguous()
        if len(scale):
            with torch.cuda.device_of(arcs):
                posteriors_kernel[len(scale),](
                    arcs, first_state, layouts, scores, residuals, scale, posteriors, grad_arcs, **ctx.options
                )
        return grad_arcs, None, None, None
