"""TDT loss against brute force and the plain transducer loss; slices, long segments, memory, invalid durations."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bestrq.recognition.losses.lattices import Lattices
from bestrq.recognition.losses.tdt import sum_over_durations, tdt_loss
from bestrq.recognition.losses.transducer import bytes_per_cell, sum_over_alignments
from common.errors import UserError
from pipelines.live_bytes import LiveBytes
from tests.lattices import assert_same

VOCAB, JOINT = 5, 4
SEGMENTS = [(4, [1, 2]), (3, []), (1, [3, 3, 3]), (1, []), (2, [4, 1, 1]), (4, [2, 2]), (3, [1])]
"""frames and labels: more labels than frames, no labels, one frame, repeated labels, fewer frames than the durations"""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(lattices: Lattices, outputs: int, dtype: torch.dtype = torch.float64, joint: int = JOINT) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    states = sum(len(labels) + 1 for labels in lattices.labels)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    frames = sum(lattices.num_frames)
    return parameter(frames, joint), parameter(states, joint), parameter(outputs, joint), parameter(outputs)


def make_lattices(segments: Sequence[tuple[int, list[int]]], **bands: Any) -> Lattices:
    labels = [torch.tensor(labels, dtype=torch.int64) for _, labels in segments]
    return Lattices([frames for frames, _ in segments], labels, **bands)


def alignments(
    frames: int, labels: int, durations: Sequence[int], t: int = 0, u: int = 0
) -> Iterator[list[tuple[int, int, bool, int]]]:
    """All paths through a lattice, as lists of arcs: frame, state, True for a label, index of the duration."""
    for index, duration in enumerate(durations):
        if duration > 0 and u == labels and t + duration == frames:
            yield [(t, u, False, index)]
        if t + duration < frames:
            if duration > 0:
                for rest in alignments(frames, labels, durations, t + duration, u):
                    yield [(t, u, False, index), *rest]
            if u < labels:
                for rest in alignments(frames, labels, durations, t + duration, u + 1):
                    yield [(t, u, True, index), *rest]


def brute_force(inputs: Inputs, lattices: Lattices, durations: Sequence[int], sigma: float = 0.0) -> Tensor:
    encoded, predicted, weight, bias = inputs
    vocab_size = len(weight) - len(durations)
    all_encoded = encoded.split(list(lattices.num_frames))
    all_predicted = predicted.split([len(labels) + 1 for labels in lattices.labels])
    losses = []
    for s, labels in enumerate(lattices.labels):
        hidden = torch.tanh(all_encoded[s][:, None] + all_predicted[s])
        logits = hidden @ weight.mT + bias
        tokens, spans = logits[..., :vocab_size].log_softmax(-1), logits[..., vocab_size:].log_softmax(-1)
        totals = []
        for path in alignments(lattices.num_frames[s], len(labels), durations):
            if lattices.first_state is not None and lattices.widths is not None:
                first = lattices.first_state[s].tolist()
                if not all(first[t] <= u < first[t] + lattices.widths[s] for t, u, _, _ in path):
                    continue
            arcs = [tokens[t, u, int(labels[u]) if label else 0] + spans[t, u, d] - sigma for t, u, label, d in path]
            totals.append(torch.stack(arcs).sum())
        losses.append(-torch.logsumexp(torch.stack(totals), dim=0))
    return torch.stack(losses)


def with_gradients(losses: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Losses, and gradients of their sum with a different weight for every segment."""
    return [losses.detach(), *torch.autograd.grad((losses * torch.arange(1, 1 + len(losses))).sum(), inputs)]


@pytest.mark.parametrize("durations", [[0, 1], [0, 1, 2, 3, 4], [0, 1, 3]])
@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_loss_and_gradients_equal_those_of_all_alignments_enumerated(durations: list[int], sigma: float) -> None:
    lattices = make_lattices(SEGMENTS)
    inputs = make_inputs(lattices, VOCAB + len(durations))
    result = tdt_loss(*inputs, lattices, durations, 10**6, sigma)
    assert result.dtype == torch.float64
    expected = brute_force(inputs, lattices, durations, sigma)
    assert_same(with_gradients(result, inputs), with_gradients(expected, inputs))


def test_the_loss_with_bands_sums_over_all_alignments_within_them() -> None:
    durations = [0, 1, 2, 4]
    bands = [torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1])]
    lattices = make_lattices([(4, [1, 2, 2]), (3, [3])], first_state=bands, widths=[2, 1])
    inputs = make_inputs(lattices, VOCAB + len(durations))
    whole = make_lattices([(4, [1, 2, 2]), (3, [3])])
    with pytest.raises(AssertionError):  # the bands exclude alignments
        assert_same([brute_force(inputs, lattices, durations)], [brute_force(inputs, whole, durations)])
    result = tdt_loss(*inputs, lattices, durations, 10**6)
    assert_same(with_gradients(result, inputs), with_gradients(brute_force(inputs, lattices, durations), inputs))


def forward_recursion(arcs: Tensor, durations: Sequence[int]) -> Tensor:
    """Equation 7 of the paper, cell by cell, for one lattice `[T, U + 1, 2 + D]`."""
    frames, states = arcs.shape[:2]
    alpha: dict[tuple[int, int], Tensor] = {(0, 0): arcs.new_zeros(())}
    end = []
    for t in range(frames + 1):
        for u in range(states):
            terms = []
            for index, d in enumerate(durations, start=2):
                if d > 0 and (t - d, u) in alpha:
                    terms.append(alpha[t - d, u] + arcs[t - d, u, 0] + arcs[t - d, u, index])
                if t < frames and (t - d, u - 1) in alpha:
                    terms.append(alpha[t - d, u - 1] + arcs[t - d, u - 1, 1] + arcs[t - d, u - 1, index])
            if t < frames and terms:
                alpha[t, u] = torch.logsumexp(torch.stack(terms), dim=0)
            elif t == frames and u == states - 1:
                end = terms
    return -torch.logsumexp(torch.stack(end), dim=0)


def random_arcs(lattices: Lattices, num_durations: int) -> Tensor:
    arcs = torch.randn(sum(lattices.cells), 2 + num_durations, generator=torch.Generator().manual_seed(1))
    return arcs.double().log_softmax(dim=-1).requires_grad_()


def test_sum_and_its_gradients_equal_those_of_autograd_through_the_forward_recursion() -> None:
    durations = [0, 1, 2, 5]
    lattices = make_lattices([(17, [1] * 5), (6, [1] * 9), (11, [2] * 6), (16, [1] * 5), (9, [])])
    arcs = random_arcs(lattices, len(durations))
    parts = zip(arcs.split(lattices.cells), lattices.num_frames, strict=True)
    expected = torch.stack(
        [forward_recursion(part.view(frames, -1, arcs.shape[1]), durations) for part, frames in parts]
    )
    result = sum_over_durations(arcs, lattices, durations)
    assert_same(with_gradients(result, [arcs]), with_gradients(expected, [arcs]), 1e-12)


def test_labels_of_duration_0_and_blanks_of_duration_1_give_the_plain_transducer_loss() -> None:
    lattices = make_lattices([(9, [1, 2, 2]), (4, [1] * 6), (5, []), (1, [1])])
    plain = random_arcs(lattices, 0)
    # Blank and label share the duration outputs. The offsets cancel for a label of duration 0, leave a blank of
    # duration 1 unchanged, and make a label of duration 1 impossible.
    moved = plain.new_tensor([0.0, -300.0, 300.0, 0.0])
    arcs = torch.cat((plain, torch.zeros_like(plain)), dim=1) + moved
    expected = with_gradients(sum_over_alignments(plain, lattices), [plain])
    assert_same(with_gradients(sum_over_durations(arcs, lattices, [0, 1]), [plain]), expected)


def test_slices_of_any_budget_give_the_same_loss() -> None:
    durations = [0, 1, 2]
    lattices = make_lattices(SEGMENTS)
    inputs = make_inputs(lattices, VOCAB + len(durations))
    whole = with_gradients(tdt_loss(*inputs, lattices, durations, 10**6), inputs)
    smallest = 4 * bytes_per_cell(JOINT, VOCAB + len(durations), 8)
    for budget in (smallest, smallest + 100, 3 * smallest):
        assert_same(with_gradients(tdt_loss(*inputs, lattices, durations, budget), inputs), whole, 1e-12)
    with pytest.raises(UserError, match=f"give {smallest} or more"):
        tdt_loss(*inputs, lattices, durations, smallest - 1)


def test_a_segments_loss_and_gradients_do_not_depend_on_its_batch() -> None:
    durations = [0, 1, 2]
    together = make_lattices(SEGMENTS)
    arcs = random_arcs(together, len(durations))
    losses, grads = with_gradients(sum_over_durations(arcs, together, durations), [arcs])
    for s, part in enumerate(arcs.split(together.cells)):
        alone = sum_over_durations(part, make_lattices(SEGMENTS[s : s + 1]), durations)
        grad = torch.autograd.grad(alone * (s + 1), arcs)[0]
        cells = slice(sum(together.cells[:s]), sum(together.cells[: s + 1]))
        assert_same([alone[0], grad[cells]], [losses[s], grads[cells]], 1e-12)


def test_float32_stays_accurate_on_2000_frames_and_100_labels() -> None:
    durations = [0, 1, 2, 3, 4]
    lattices = make_lattices([(2000, [1, 2, 3, 3] * 25)])
    arcs = random_arcs(lattices, len(durations))
    narrow = arcs.detach().float().requires_grad_()
    loss, grad = with_gradients(sum_over_durations(narrow, lattices, durations), [narrow])
    torch.testing.assert_close(loss.double(), sum_over_durations(arcs, lattices, durations), rtol=1e-5, atol=0)
    emitted = -grad.view(2000, 101, -1)[..., 1].sum(dim=0)  # every label is emitted once; the last state emits none
    torch.testing.assert_close(emitted, torch.ones(101).index_fill(0, torch.tensor([100]), 0.0), rtol=0, atol=1e-4)


def test_bfloat16_inputs_give_float32_losses_and_finite_gradients() -> None:
    lattices = make_lattices(SEGMENTS)
    inputs = make_inputs(lattices, VOCAB + 3, torch.bfloat16)
    result = tdt_loss(*inputs, lattices, [0, 1, 2], 10**6)
    encoded, predicted, weight, bias = (x.detach().double() for x in inputs)
    exact = tdt_loss(encoded, predicted, weight, bias, lattices, [0, 1, 2], 10**6)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=0.03, atol=0)
    assert all(grad.isfinite().all() for grad in with_gradients(result, inputs))


def peak_bytes(frames: int, states: int, joint: int, slices: int) -> int:
    lattices = make_lattices([(frames, [1] * (states - 1))])
    inputs = make_inputs(lattices, 256 + 3, torch.float32, joint)
    live = LiveBytes()
    with live:
        budget = slices * states * bytes_per_cell(joint, 256 + 3, 4)
        tdt_loss(*inputs, lattices, [0, 1, 2], budget).sum().backward()
    return live.peak


@pytest.mark.parametrize("joint", [16, 256])
def test_a_slice_stays_within_its_budget(joint: int) -> None:
    least, more = (peak_bytes(20, 21, joint, slices) for slices in (1, 6))
    assert more - least <= 5 * 21 * bytes_per_cell(joint, 256 + 3, 4)


def test_memory_per_cell_is_a_few_numbers_for_any_vocabulary() -> None:
    short, long = (peak_bytes(frames, 31, 32, 1) for frames in (40, 80))
    # 4 + D numbers are kept, 2 (2 + D) more exist while gradients are computed, and 8 bytes are spare; the outputs
    # would take 1036 bytes.
    per_frame = 31 * (4 * (4 + 3 + 2 * (2 + 3)) + 8) + 32 * 16
    assert 0 < long - short <= 40 * per_frame


def test_a_batch_without_segments_keeps_the_graph() -> None:
    inputs = make_inputs(make_lattices([]), VOCAB + 2)
    result = tdt_loss(*inputs, make_lattices([]), [0, 1], 10**6)
    assert result.shape == (0,)
    result.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


@pytest.mark.parametrize("durations", [[], [0], [1], [1, 2], [0, 2], [0, 1, 1], [1, 0], [0, 1, 3, 2], [-1, 0, 1]])
def test_durations_that_leave_a_segment_without_alignment_are_refused(durations: list[int]) -> None:
    lattices = make_lattices([(2, [1])])
    inputs = make_inputs(lattices, VOCAB + len(durations))
    with pytest.raises(UserError, match=r"transducer\.durations is \[.*start with 0 and 1"):
        tdt_loss(*inputs, lattices, durations, 10**6)
