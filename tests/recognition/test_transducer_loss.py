"""Transducer loss against enumeration and torchaudio; slices, padding, long segments, extreme values, memory."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bestrq.recognition.losses.lattices import Lattices, check_labels
from bestrq.recognition.losses.transducer import (
    _slices,
    _visited_states,
    sum_by_diagonals,
    sum_over_alignments,
    transducer_loss,
)
from bestrq.recognition.transducer import TransducerSettings
from common.errors import UserError
from pipelines.live_bytes import LiveBytes
from tests.lattices import assert_same, brute_force_loss, joint_arcs, made_lattices

ENOUGH = 2**40
VISITED_STATES = "bestrq.recognition.losses.transducer._visited_states"
SIZES = [(4, 2), (1, 0), (3, 4), (2, 3), (1, 3), (3, 0), (4, 3)]
"""(T, U): no labels, one frame, both, more labels than frames"""


def weighted(losses: Tensor) -> Tensor:
    """Weighted sum, in which every segment's loss has a different gradient."""
    return (losses * torch.linspace(0.5, 2.0, len(losses), dtype=losses.dtype)).sum()


def loss_and_gradients(
    tensors: Sequence[Tensor], lattices: Lattices, budget: int = ENOUGH, fast_emit: float = 0.0
) -> list[Tensor]:
    losses = transducer_loss(*tensors, lattices, budget, fast_emit)
    return [losses.detach(), *torch.autograd.grad(weighted(losses), tensors)]


def brute_force(tensors: Sequence[Tensor], lattices: Lattices) -> list[Tensor]:
    losses = torch.stack([brute_force_loss(arcs) for arcs in joint_arcs(tensors, lattices)])
    return [losses.detach(), *torch.autograd.grad(weighted(losses), tensors)]


def smallest_budget(tensors: Sequence[Tensor], lattices: Lattices) -> int:
    with pytest.raises(UserError, match="transducer.slice_bytes is 1:") as error:
        transducer_loss(*tensors, lattices, 1)
    match = re.search(r"give (\d+) or more", str(error.value))
    assert match is not None
    return int(match[1])


def test_loss_and_all_gradients_equal_those_of_all_alignments_enumerated() -> None:
    tensors, lattices = made_lattices(SIZES)
    lattices.labels[-1][:] = 2  # one label repeated
    assert_same(loss_and_gradients(tensors, lattices), brute_force(tensors, lattices), 1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_the_loss_of_a_single_segment_equals_enumeration_in_float64_and_float32(
    size: tuple[int, int],
) -> None:
    tensors, lattices = made_lattices([size])
    assert_same(loss_and_gradients(tensors, lattices), brute_force(tensors, lattices), 1e-9)
    low = [tensor.detach().float().requires_grad_() for tensor in tensors]
    actual = loss_and_gradients(low, lattices)
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    assert_same([tensor.double() for tensor in actual], brute_force(tensors, lattices), 1e-5)


def test_lattices_with_one_alignment_do_not_depend_on_torchaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CUDA kernel leaves their costs unwritten, which NaN stands for here, and their gradients too."""

    def loss_of_cuda(logits: Tensor, targets: Tensor, frames: Tensor, labels: Tensor, **options: Any) -> Tensor:
        losses, unwritten = rnnt_loss(logits, targets, frames, labels, **options).clone(), (frames == 1) | (labels == 0)
        losses[unwritten] = losses[unwritten] * torch.nan
        return losses

    rnnt_loss = torchaudio.functional.rnnt_loss
    monkeypatch.setattr(torchaudio.functional, "rnnt_loss", loss_of_cuda)
    for sizes in (SIZES, [(5, 0), (1, 4), (1, 0)], [(3, 2)]):
        tensors, lattices = made_lattices(sizes)
        low = [tensor.detach().float().requires_grad_() for tensor in tensors]
        actual = loss_and_gradients(low, lattices)
        assert_same([tensor.double() for tensor in actual], brute_force(tensors, lattices), 1e-5)


def test_the_sum_by_diagonals_equals_that_of_all_alignments_with_its_gradients() -> None:
    for frames in range(1, 5):
        for labels in range(5):
            arcs = -torch.rand(frames, labels + 1, 2, dtype=torch.float64).requires_grad_()
            reference = brute_force_loss(arcs)
            actual = sum_by_diagonals(arcs)
            assert abs(actual - reference) < 1e-12
            assert_same(torch.autograd.grad(actual, arcs), torch.autograd.grad(reference, arcs), 1e-12)


def test_float32_loss_and_gradients_equal_torchaudios_over_the_full_vocabulary() -> None:
    """Tolerance 2e-5 of each gradient's norm: the error against float64 is 1.4e-5 for torchaudio, here 0.4e-5."""
    sizes = [(60, 20), (37, 11)]
    tensors, lattices = made_lattices(sizes, torch.float32, joint=16, vocab=50)
    with torch.no_grad():
        tensors[2] *= (
            0.25  # the scale of initial weights; torchaudio's gradients of larger outputs have an error of 3e-5
        )
    actual = loss_and_gradients(tensors, lattices, budget=2**18)
    encoded, predicted = (
        torch.nn.utils.rnn.pad_sequence(part.split(lengths), batch_first=True)
        for part, lengths in zip(tensors, ([60, 37], [21, 12]), strict=False)
    )
    logits = torch.tanh(encoded[:, :, None] + predicted[:, None]) @ tensors[2].T + tensors[3]
    targets = torch.nn.utils.rnn.pad_sequence(lattices.labels, batch_first=True).int()
    lengths = torch.tensor(sizes, dtype=torch.int32).T.contiguous()
    losses = torchaudio.functional.rnnt_loss(logits, targets, *lengths, blank=0, reduction="none")
    reference = [losses.detach(), *torch.autograd.grad(weighted(losses), tensors)]
    for result, expected in zip(actual, reference, strict=True):
        assert (result - expected).norm() < 2e-5 * expected.norm()
    exact = loss_and_gradients([tensor.detach().double().requires_grad_() for tensor in tensors], lattices, 2**18)
    for result, expected in zip(actual, exact, strict=True):
        assert (result - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("size", [(30_000, 40), (300, 2000)], ids=["20-minutes", "2000-labels"])
def test_gradients_of_long_segments_are_finite_and_sum_to_their_frames_and_labels(
    size: tuple[int, int],
) -> None:
    """Every alignment takes T blanks and U labels, so the gradients of the arcs sum to -T and -U. The error of
    torchaudio's float32 sums is 2 % over 30,000 frames of initial weights."""
    tensors, lattices = made_lattices([size], torch.float32, joint=3, vocab=4)
    actual = loss_and_gradients(tensors, lattices, budget=2**22)
    assert all(tensor.isfinite().all() for tensor in actual)
    arcs = torch.cat([part.flatten(0, 1) for part in joint_arcs(tensors, lattices)]).detach().requires_grad_()
    losses = sum_over_alignments(arcs, lattices)
    torch.testing.assert_close(actual[0], losses.detach(), rtol=1e-5, atol=0)
    [grad] = torch.autograd.grad(losses.sum(), arcs)
    assert (-grad.sum(dim=0)).tolist() == pytest.approx(size, rel=5e-2)


def test_extreme_logits_give_the_losses_and_gradients_of_float64() -> None:
    tensors, lattices = made_lattices(SIZES)
    with torch.no_grad():
        tensors[2] *= 1e4
    reference = loss_and_gradients(tensors, lattices)
    actual = loss_and_gradients([tensor.detach().float().requires_grad_() for tensor in tensors], lattices)
    for result, expected in zip(actual, reference, strict=True):
        assert expected.isfinite().all() and (result - expected).abs().max() < 1e-2 * expected.abs().max()


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 1.0))
def test_any_budget_gives_the_same_loss_and_gradients(share: float) -> None:
    tensors, lattices = made_lattices(SIZES)
    smallest = smallest_budget(tensors, lattices)
    budget = smallest + int(share * 4 * smallest)
    assert_same(loss_and_gradients(tensors, lattices, budget), loss_and_gradients(tensors, lattices), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_smallest_budget_in_the_message_suffices_and_a_byte_less_does_not(dtype: torch.dtype) -> None:
    tensors, lattices = made_lattices(SIZES, dtype)
    smallest = smallest_budget(tensors, lattices)
    assert transducer_loss(*tensors, lattices, smallest).isfinite().all()
    with pytest.raises(UserError, match=f"transducer.slice_bytes is {smallest - 1}: .* give {smallest} or more"):
        transducer_loss(*tensors, lattices, smallest - 1)


def peak_bytes(frames: int, dtype: torch.dtype, joint: int, vocab: int, banded: bool, slices: int) -> tuple[int, int]:
    """Peak of allocated bytes in forward and backward, with `slices` times the smallest budget; and that budget."""
    tensors, lattices = made_lattices([(frames, 60)], dtype, joint, vocab)
    if banded:
        first = torch.arange(frames) * 30 // (frames - 1)
        lattices = replace(lattices, first_state=[first], widths=[31])
    smallest = smallest_budget(tensors, lattices)
    live = LiveBytes()
    with live:
        transducer_loss(*tensors, lattices, slices * smallest).sum().backward()
    return live.peak, smallest


@pytest.mark.parametrize("banded", [False, True], ids=["whole", "banded"])
@pytest.mark.parametrize(("joint", "vocab"), [(64, 256), (128, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_slice_stays_within_its_budget(
    dtype: torch.dtype, joint: int, vocab: int, banded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Short slices could skip more states and then take less than their budget.
    monkeypatch.setattr(VISITED_STATES, lambda flow: torch.tensor([0, flow.shape[1]]))
    frames, slices, width = 20, 6, 31 if banded else 61
    least, more = (peak_bytes(frames, dtype, joint, vocab, banded, count) for count in (1, slices))
    assert more[0] - least[0] <= (slices - 1) * least[1]
    # So does a single slice: 24 bytes per cell are kept, and gradients with their summands, in float32.
    gradients = (frames + 61 + vocab) * joint + vocab
    assert least[0] <= least[1] + frames * width * 24 + gradients * 8


def test_memory_per_cell_is_a_few_numbers_for_any_vocabulary() -> None:
    joint, vocab, states = 32, 256, 61
    (short, _), (long, _) = (peak_bytes(frames, torch.float32, joint, vocab, False, 1) for frames in (40, 80))
    per_frame = states * 40 + joint * 16  # 40 bytes per cell (outputs would take 1024); gradients of the frame
    assert 0 < long - short <= 40 * per_frame
    weight_bytes = 3 * vocab * joint * 4
    slice_bytes = states * (3 * joint + 2 * vocab) * 4
    assert short <= 40 * per_frame + weight_bytes + slice_bytes + 2**12


def test_lattices_of_mixed_sizes_summed_together_equal_each_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(1, 40, (40,), generator=generator).tolist()
    states = torch.randint(0, 25, (40,), generator=generator).tolist()
    sizes = [*zip(frames, states, strict=True), (1, 0), (1, 0), (200, 1), (1, 24)]
    tensors, lattices = made_lattices(sizes, torch.float32)
    arcs = torch.cat([part.flatten(0, 1) for part in joint_arcs(tensors, lattices)]).detach().requires_grad_()
    together = sum_over_alignments(arcs, lattices)
    parts = zip(arcs.split(lattices.cells), lattices.num_frames, lattices.labels, strict=True)
    alone = torch.cat([sum_over_alignments(part, Lattices([n], [labels])) for part, n, labels in parts])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    assert_same(*(torch.autograd.grad(weighted(losses), arcs) for losses in (together, alone)), 1e-6)
    by_diagonals = sum_over_alignments(arcs.detach().double(), lattices)
    torch.testing.assert_close(together.double(), by_diagonals, rtol=1e-5, atol=1e-5)


def test_fast_emit_keeps_the_value_and_scales_the_gradients_of_labels_only() -> None:
    tensors, lattices = made_lattices(SIZES)
    plain, faster = loss_and_gradients(tensors, lattices), loss_and_gradients(tensors, lattices, fast_emit=0.25)
    torch.testing.assert_close(faster[0], plain[0], rtol=0, atol=1e-12)
    arcs = joint_arcs(tensors, lattices)
    losses = torch.stack([brute_force_loss(part) for part in arcs])
    grads = torch.autograd.grad(weighted(losses), arcs, retain_graph=True)
    scaled = [grad * grad.new_tensor([1.0, 1.25]) for grad in grads]
    assert_same(faster[1:], torch.autograd.grad(arcs, tensors, scaled), 1e-9)
    assert (faster[1] - plain[1]).abs().max() > 1e-3


def test_a_batch_without_segments_has_no_losses_and_gradients_of_zero() -> None:
    tensors, lattices = made_lattices([])
    losses = transducer_loss(*tensors, lattices, 1)
    assert losses.shape == (0,)
    assert all(not grad.any() for grad in torch.autograd.grad(losses.sum(), tensors))


@pytest.mark.parametrize("wrong", [0, 5, -1])
def test_a_label_outside_the_vocabulary_is_named(wrong: int) -> None:
    labels = torch.tensor([[1, 2, 99], [4, wrong, 3]])
    with pytest.raises(UserError, match=f"label {wrong} at position 1 of segment 1: .* labels 1 to 4"):
        check_labels(labels, torch.tensor([2, 2]), 5)
    check_labels(labels, torch.tensor([2, 1]), 5)


def test_states_skipped_in_the_backward_pass_change_gradients_by_less_than_their_rounding() -> None:
    tensors, lattices = made_lattices([(300, 40)], torch.float32, 32, 48)
    shares = []

    def recorded(flow: Tensor) -> Tensor:
        span = _visited_states(flow)
        shares.append(int(span.diff()) / flow.shape[1])
        return span

    smallest = smallest_budget(tensors, lattices)
    with mock.patch(VISITED_STATES, recorded):
        actual = loss_and_gradients(tensors, lattices, smallest)
    with mock.patch(VISITED_STATES, lambda flow: torch.tensor([0, flow.shape[1]])):
        reference = loss_and_gradients(tensors, lattices, smallest)
    assert sum(shares) < 0.8 * len(shares)
    for result, expected in zip(actual, reference, strict=True):
        assert (result - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_the_skipped_gradients_of_a_frame_sum_to_less_than_a_rounding_error() -> None:
    """The sum of the tails is bounded; a bound on single states would keep many more states of a wide lattice."""
    eps = torch.finfo(torch.float32).eps
    tail = torch.full((40,), eps / 50)  # 0.8 eps in total, of the 16 / 2 eps that may be skipped on either side
    flow = torch.cat((tail, torch.ones(16), tail.flip(0)))[None]
    assert _visited_states(flow).tolist() == [40, 56]
    assert _visited_states(torch.cat((flow, flow.roll(4)))).tolist() == [40, 64]  # 60, rounded up to a multiple of 8
    flow[0, :40] = eps
    assert _visited_states(flow).tolist() == [8, 56]


def test_the_number_of_slices_on_the_cpu_is_small() -> None:
    """Every operation on a slice is a barrier for all threads. If another process uses a core, each barrier takes a
    scheduler time slice: slices of the size of the cache made the loss ten times slower."""
    labels = [torch.ones(100, dtype=torch.int64)] * 8
    parts = list(_slices(Lattices([500] * 8, labels), torch.zeros(1024, 512), TransducerSettings.slice_bytes))
    assert len(parts) <= 96


def test_a_non_finite_gradient_is_never_skipped() -> None:
    flow = torch.zeros(2, 40)
    flow[0, 20], flow[1, 30] = 1.0, torch.nan
    assert _visited_states(flow).tolist() == [0, 40]  # no value is small relative to NaN
    flow[1, 30] = torch.inf
    assert _visited_states(flow).tolist() == [30, 38]
    assert _visited_states(torch.zeros(2, 40)).tolist() == [0, 40]


def test_float32_gradients_of_a_long_lattice_with_many_paths_agree_with_float64() -> None:
    """An alignment has one blank per frame; torchaudio's gradients violate this along the lattice, by 0.7 %."""
    lattices = Lattices([2000], [torch.ones(200, dtype=torch.int64)])
    arcs = torch.randn(2000 * 201, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 5
    grads = []
    for dtype in (torch.float64, torch.float32):
        leaf = arcs.to(dtype).requires_grad_()
        [loss] = sum_over_alignments(leaf, lattices)
        grads.append(torch.autograd.grad(loss, leaf)[0].double())
    assert (grads[1] - grads[0]).norm() < 2e-3 * grads[0].norm()
    blanks = -grads[1][:, 0].view(2000, 201).sum(dim=1)
    torch.testing.assert_close(blanks, torch.ones_like(blanks), rtol=0, atol=1e-5)
