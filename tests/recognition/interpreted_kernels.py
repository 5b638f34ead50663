"""Differences between the kernels in Triton's interpreter and the CPU's losses, as JSON; see test_loss_kernels.py.

The interpreter is chosen when triton is imported: TRITON_INTERPRET=1 must be set, so this runs in its own process.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from bestrq.recognition.losses import kernels, tdt, transducer
from bestrq.recognition.losses.kernels import Alignments
from bestrq.recognition.losses.lattices import Lattices

SIZES = [(5, 3), (2, 4), (3, 0), (1, 2), (1, 0)]
BANDS = [[0, 0, 1, 2, 2], [0, 2], [0, 0, 0], [0], [0]]
WIDTHS = [2, 3, 1, 3, 1]
DURATIONS = (0, 1, 2, 4)
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
    with mock.patch.object(kernels, "LARGEST_BLOCK", 2):
        values["tdt in blocks"] = difference(whole, DURATIONS, 0.05)
    print(json.dumps(values))


if __name__ == "__main__":
    main()
