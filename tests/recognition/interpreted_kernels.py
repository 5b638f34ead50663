"""Differences between the kernels in Triton's interpreter and the CPU's losses, as JSON; see test_loss_kernels.py.

The interpreter is chosen when triton is imported: TRITON_INTERPRET=1 must be set, so this runs in its own process.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from bestrq.recognition.losses import ctc, ctc_kernels, kernels, tdt, transducer
from bestrq.recognition.losses.kernels import Alignments
from bestrq.recognition.losses.lattices import Lattices

SIZES = [(5, 3), (2, 4), (3, 0), (1, 2), (1, 0)]
BANDS = [[0, 0, 1, 2, 2], [0, 2], [0, 0, 0], [0], [0]]
WIDTHS = [2, 3, 1, 3, 1]
DURATIONS = (0, 1, 2, 4)
CTC_SEGMENTS = [
    (1, 9, [1, 2, 3]), (12, 12, [2, 2, 1, 2, 4]), (26, 4, []), (31, 1, [3]), (34, 1, []), (36, 5, [1, 1, 1]),
    (42, 4, [1, 1, 1]), (47, 4, [4, 3, 2, 1]),
]  # fmt: skip
"""first frame, frames, labels: repeated and equal neighbours, none, one frame, as few as possible, too few"""
Sum = Callable[[Tensor, Lattices], Tensor]


def make_lattices(sizes: Sequence[tuple[int, int]], banded: bool = False) -> Lattices:
    labels = [torch.ones(count, dtype=torch.int64) for _, count in sizes]
    frames = [size[0] for size in sizes]
    if not banded:
        return Lattices(frames, labels)
    return Lattices(frames, labels, [torch.tensor(first) for first in BANDS], WIDTHS)


def make_arcs(lattices: Lattices, durations: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    arcs = torch.randn(sum(lattices.cells), 2 + len(durations), generator=torch.Generator().manual_seed(0))
    return arcs.double().log_softmax(dim=-1).to(dtype).requires_grad_()


def results(function: Sum, arcs: Tensor, lattices: Lattices) -> list[Tensor]:
    """Losses, and gradients of their sum with a different weight for every segment."""
    losses = function(arcs, lattices)
    weights = torch.arange(1, 1 + len(losses)).to(losses)
    return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), arcs)]


def difference(
    lattices: Lattices, durations: tuple[int, ...] | None, sigma: float = 0.0, dtype: torch.dtype = torch.float64
) -> float:
    """Largest difference of losses and gradients from those of the reference, NaN if one of them is NaN."""
    arcs = make_arcs(lattices, durations or (), dtype)
    reference: Sum = transducer.sum_over_alignments
    if durations:
        reference = partial(tdt.sum_over_durations, durations=durations, sigma=sigma)

    def own(arcs: Tensor, lattices: Lattices) -> Tensor:
        return Alignments.apply(arcs, lattices, durations, sigma)

    pairs = zip(results(own, arcs, lattices), results(reference, arcs, lattices), strict=True)
    return max(float((actual - expected).abs().max()) for actual, expected in pairs)


def selected() -> float:
    """Difference of the public functions with kernels from those without."""
    lattices, largest = make_lattices(SIZES[:3]), 0.0
    functions = [(transducer, transducer.sum_over_alignments, ())]
    functions += [(tdt, partial(tdt.sum_over_durations, durations=(0, 1, 2), sigma=0.05), (0, 1, 2))]
    for module, function, durations in functions:
        arcs = make_arcs(lattices, durations)
        expected = results(function, arcs, lattices)
        with (
            mock.patch.object(module, "use_kernels", lambda arcs: True),
            mock.patch.object(kernels.Alignments, "apply", wraps=kernels.Alignments.apply) as apply,
        ):
            actual = results(function, arcs, lattices)
        assert apply.call_count == 1
        largest = max(largest, *(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True)))
    return largest


def drift() -> float:
    """Error of the probability of every label, of a segment with a loss of 10,000 nats, in float32."""
    lattices = make_lattices([(50, 3)])
    arcs = (make_arcs(lattices, (), torch.float32).detach() - 200).requires_grad_()
    _, grad = results(lambda arcs, lattices: Alignments.apply(arcs, lattices), arcs, lattices)
    return float((-grad.view(50, 4, 2)[:, :3, 1].sum(dim=0) - 1).abs().max())


def not_a_number() -> list[bool]:
    """Whether the loss of each of two segments is NaN, one of which has NaN as an arc."""
    lattices = make_lattices([(3, 2), (3, 2)])
    arcs = make_arcs(lattices, ()).detach()
    arcs[4, 1] = torch.nan
    return Alignments.apply(arcs, lattices).isnan().tolist()


# ---- CTC ----


def make_log_probs(dtype: torch.dtype = torch.float64) -> Tensor:
    """Two rows of 26 frames with 5 symbols, `[52, 5]`."""
    outputs = 3 * torch.randn(52, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return outputs.log_softmax(dim=-1).to(dtype).requires_grad_()


def pack(segments: Sequence[tuple[int, int, list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Starts, lengths, padded labels and their numbers; the padding is not 0."""
    starts, lengths, labels = zip(*segments, strict=True)
    padded = torch.full((len(labels), max(map(len, labels)) + 1), 2)
    for row, sequence in zip(padded, labels, strict=True):
        row[: len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return torch.tensor(starts), torch.tensor(lengths), padded, torch.tensor([len(sequence) for sequence in labels])


def both_ctc_losses(log_probs: Tensor, *segments: Tensor) -> list[list[Tensor]]:
    """Losses, and gradients of their weighted sum, of the kernels and of F.ctc_loss in float64."""
    both = []
    for kernels_used, values in ((True, log_probs), (False, log_probs.detach().double().requires_grad_())):
        with mock.patch.object(ctc, "use_kernels", lambda log_probs, used=kernels_used: used):
            losses = ctc.ctc_losses(values, *segments)
        weights = torch.arange(1, 1 + len(losses)).to(losses)
        [grad] = torch.autograd.grad((losses * weights).sum(), values)
        # F.ctc_loss returns the gradient before log_softmax, exp(log_probs) - posteriors, for log_softmax to keep.
        grad = grad - values.detach().exp() * grad.sum(dim=-1, keepdim=True)
        both.append([losses.detach().double(), grad.double()])
    return both


def ctc_difference(segments: Sequence[tuple[int, int, list[int]]], dtype: torch.dtype = torch.float64) -> float:
    """Largest difference of losses and gradients from those of F.ctc_loss in float64."""
    pairs = zip(*both_ctc_losses(make_log_probs(dtype), *pack(segments)), strict=True)
    return max(float((actual - expected).abs().max()) for actual, expected in pairs)


def ctc_without_gradients() -> float:
    """Largest difference of losses that are computed in one direction only."""
    log_probs, segments = make_log_probs().detach(), pack(CTC_SEGMENTS)
    with mock.patch.object(ctc, "use_kernels", lambda log_probs: True):
        losses = ctc.ctc_losses(log_probs, *segments)
    return float((losses - ctc.ctc_losses(log_probs, *segments)).abs().max())


def ctc_drift() -> list[float]:
    """Errors of the loss, relative, and of the gradients of a segment with a loss of 10,000 nats, in float32."""
    log_probs = (make_log_probs(torch.float32).detach() - 200).requires_grad_()
    segments = pack([(0, 50, [1, 2, 2, 4, 3, 1])])
    results = []
    for values in (log_probs, log_probs.detach().double().requires_grad_()):
        losses = ctc_kernels.CTCAlignments.apply(values, *segments)
        results.append([losses.detach().double(), torch.autograd.grad(losses.sum(), values)[0].double()])
    (loss, grad), (expected, expected_grad) = results
    return [float((loss / expected - 1).abs()), float((grad - expected_grad).abs().max()), float(expected)]


def ctc_not_a_number() -> list[list[bool]]:
    """Whether the loss and a gradient of each of two segments is NaN, one of which has NaN as a log-probability."""
    log_probs = make_log_probs().detach()
    log_probs[4, 1] = torch.nan
    log_probs.requires_grad_()
    losses = ctc_kernels.CTCAlignments.apply(log_probs, *pack([(2, 6, [1, 2]), (12, 6, [1, 2])]))
    [grad] = torch.autograd.grad(losses.sum(), log_probs)
    return [losses.isnan().tolist(), [bool(grad[2:8].isnan().any()), bool(grad[8:].isnan().any())]]


def ctc_impossible() -> list[float]:
    """Losses and largest gradients of two segments with too many labels, and the loss of one between them."""
    log_probs = make_log_probs()
    losses = ctc_kernels.CTCAlignments.apply(log_probs, *pack([(0, 2, [1, 1]), (4, 3, [1, 1]), (8, 1, [1, 2])]))
    [grad] = torch.autograd.grad(losses.sum(), log_probs)
    frames = grad.abs().sum(dim=1)
    losses = losses.detach()
    return [float(losses[0]), float(losses[2]), float(frames[:4].max()), float(frames[7:].max()), float(losses[1])]


def main() -> None:
    torch.set_num_threads(1)
    whole, banded = make_lattices(SIZES), make_lattices(SIZES, banded=True)
    values: dict[str, object] = {
        "tdt with bands": difference(banded, DURATIONS, 0.05),
        "plain": difference(whole, None),
        "plain with bands": difference(banded, None),
        "selected": selected(),
        "tdt float32": difference(whole, DURATIONS, dtype=torch.float32),
        "drift": drift(),
        "not a number": not_a_number(),
    }
    values |= {
        "ctc": ctc_difference(CTC_SEGMENTS),
        "ctc without labels": ctc_difference([(3, 5, []), (9, 2, [])]),
        "ctc float32": ctc_difference(CTC_SEGMENTS, torch.float32),
        "ctc without gradients": ctc_without_gradients(),
        "ctc drift": ctc_drift(),
        "ctc not a number": ctc_not_a_number(),
        "ctc impossible": ctc_impossible(),
    }
    with mock.patch.object(kernels, "LARGEST_BLOCK", 2):
        values["tdt in blocks"] = difference(whole, DURATIONS, 0.05)
    print(json.dumps(values))


if __name__ == "__main__":
    main()
