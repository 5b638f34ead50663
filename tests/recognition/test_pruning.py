"""Pruned transducer: simple joint network against its definition, choice of bands, loss within bands."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bestrq.recognition.losses.lattices import Lattices
from bestrq.recognition.losses.pruning import SimpleJoint, band_width, choose_band, simple_arcs
from bestrq.recognition.losses.transducer import sum_over_alignments, transducer_loss
from tests.lattices import assert_same, brute_force_loss, joint_arcs, made_lattices, select_arcs

ENOUGH = 2**40
SIZES = [(4, 3), (5, 2), (1, 2), (3, 0), (1, 0), (2, 4)]


def made_bands(lattices: Lattices, band: int, seed: int = 0) -> Lattices:
    """Lattices with the bands of random probabilities."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(frames, len(labels) + 1) for frames, labels in zip(lattices.num_frames, lattices.labels, strict=True)]
    widths = [band_width(*size, band) for size in sizes]
    passed = [torch.rand(size, generator=generator) for size in sizes]
    return replace(
        lattices, first_state=[choose_band(*part) for part in zip(passed, widths, strict=True)], widths=widths
    )


def losses_of_bands(arcs: list[Tensor], lattices: Lattices) -> Tensor:
    assert lattices.first_state is not None and lattices.widths is not None
    bands = zip(arcs, lattices.first_state, lattices.widths, strict=True)
    return torch.stack([brute_force_loss(part, first.tolist(), width) for part, first, width in bands])


def simple_parts(
    dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[SimpleJoint, Tensor, Tensor, Lattices, list[Tensor]]:
    """Simple joint network, its inputs, and reference arcs by the log-softmax of the added outputs."""
    _, lattices = made_lattices(SIZES)
    torch.manual_seed(0)
    network = SimpleJoint(7, 6, 5).to(dtype)
    frames = torch.randn(sum(lattices.num_frames), 7, dtype=dtype) * scale
    predicted = torch.randn(sum(len(labels) + 1 for labels in lattices.labels), 6, dtype=dtype) * scale
    states = [len(labels) + 1 for labels in lattices.labels]
    acoustic = network.encoder_output(frames).split(list(lattices.num_frames))
    language = network.prediction_output(predicted).split(states)
    parts = zip(acoustic, language, lattices.labels, strict=True)
    arcs = [select_arcs((a[:, None] + b).log_softmax(-1), labels) for a, b, labels in parts]
    return network, frames, predicted, lattices, arcs


def test_simple_arcs_are_the_log_softmax_of_the_added_outputs() -> None:
    torch.manual_seed(0)
    for frames, states in ((4, 3), (1, 1), (1, 4), (3, 1)):
        acoustic = (5 * torch.randn(frames, 6, dtype=torch.float64)).requires_grad_()
        language = (5 * torch.randn(states, 6, dtype=torch.float64)).requires_grad_()
        labels = torch.randint(1, 6, (states - 1,))
        actual = simple_arcs(acoustic, language, labels)
        reference = select_arcs((acoustic[:, None] + language).log_softmax(-1), labels)
        used = torch.ones_like(actual, dtype=torch.bool)
        used[:, -1, 1] = False  # the last state has no next label
        assert_same([actual[used]], [reference[used]], 1e-12)
        weight = torch.randn_like(actual[used])
        grads = (torch.autograd.grad((weight * arcs[used]).sum(), (acoustic, language)) for arcs in (actual, reference))
        assert_same(*grads, 1e-12)
        assert actual.isfinite().all()


def test_simple_arcs_and_gradients_are_finite_for_outputs_that_differ_by_hundreds() -> None:
    acoustic = torch.tensor([[300.0, 0.0, -300.0]]).requires_grad_()
    language = torch.tensor([[-300.0, 0.0, 300.0], [0.0, 0.0, 0.0]]).requires_grad_()
    arcs = simple_arcs(acoustic, language, torch.tensor([2]))
    assert arcs.isfinite().all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(arcs.sum(), (acoustic, language)))


def test_simple_arcs_are_float32_under_bfloat16_autocast() -> None:
    torch.manual_seed(0)
    acoustic, language = torch.randn(30, 200, requires_grad=True), torch.randn(9, 200)
    arcs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            arcs.append(simple_arcs(acoustic, language, torch.arange(1, 9)))
    assert_same([arcs[1]], [arcs[0]], 1e-6)
    assert_same(*(torch.autograd.grad(outputs.sum(), acoustic) for outputs in arcs), 1e-4)


def test_loss_and_gradients_of_the_simple_joint_network_equal_those_of_all_alignments() -> None:
    network, frames, predicted, lattices, arcs = simple_parts()
    reference = torch.stack([brute_force_loss(part) for part in arcs])
    actual, _ = network(frames, predicted, lattices, band=2)
    assert_same([actual], [reference], 1e-9)
    weights = list(network.parameters())
    assert_same(*(torch.autograd.grad(losses.sum(), weights) for losses in (actual, reference)), 1e-9)


def test_gradients_of_arcs_are_minus_the_probabilities_that_alignments_take_them() -> None:
    """An alignment has one blank per frame and every label once: probabilities sum to 1 over states or over frames."""
    _, _, _, lattices, arcs = simple_parts()
    leaf = torch.cat([part.flatten(0, 1) for part in arcs]).detach().requires_grad_()
    [grad] = torch.autograd.grad(sum_over_alignments(leaf, lattices).sum(), leaf)
    for part, frames, labels in zip(grad.split(lattices.cells), lattices.num_frames, lattices.labels, strict=True):
        taken = -part.view(frames, len(labels) + 1, 2)
        assert (taken > -1e-12).all()
        torch.testing.assert_close(taken[..., 0].sum(dim=1), torch.ones(frames, dtype=torch.float64))
        expected = torch.ones(len(labels) + 1, dtype=torch.float64)
        expected[-1] = 0
        torch.testing.assert_close(taken[..., 1].sum(dim=0), expected)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 30), st.integers(0, 30), st.integers(2, 35), st.integers(0, 2**31), st.sampled_from([0.0, 1.0, 30.0])
)
def test_bands_connect_the_first_state_with_the_last(
    num_frames: int, num_labels: int, band: int, seed: int, sharpness: float
) -> None:
    states = num_labels + 1
    width = band_width(num_frames, states, band)
    assert min(band, states) <= width <= states
    scores = sharpness * torch.randn(num_frames, states, generator=torch.Generator().manual_seed(seed))
    first = choose_band(scores.softmax(dim=1), width)
    assert first.dtype == torch.int64 and first.shape == (num_frames,)
    assert first[0] == 0 and first[-1] == states - width
    moves = first.diff()
    assert (moves >= 0).all() and (moves <= width - 1).all()


def test_bands_are_wider_than_requested_only_if_frames_are_too_few() -> None:
    assert [band_width(10, states, 4) for states in (1, 3, 4, 30, 31, 32, 41)] == [1, 3, 4, 4, 4, 5, 5]
    assert band_width(1, 9, 2) == 9


def test_a_band_follows_the_most_probable_path() -> None:
    passed = torch.zeros(10, 8)
    path = [0, 0, 1, 2, 2, 3, 5, 6, 7, 7]
    passed[torch.arange(10), torch.tensor(path)] = 1
    first = choose_band(passed, 3)
    assert all(low <= state < low + 3 for low, state in zip(first.tolist(), path, strict=True))


@pytest.mark.parametrize("band", [5, 100])
def test_bands_with_all_states_change_neither_loss_nor_gradients(band: int) -> None:
    tensors, lattices = made_lattices(SIZES)
    losses = transducer_loss(*tensors, lattices, ENOUGH)
    banded = transducer_loss(*tensors, made_bands(lattices, band), ENOUGH)
    assert_same([banded], [losses], 1e-12)
    assert_same(*(torch.autograd.grad(values.sum(), tensors) for values in (banded, losses)), 1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("band", [2, 3])
def test_the_loss_with_bands_sums_over_all_alignments_within_them(band: int, seed: int) -> None:
    tensors, lattices = made_lattices([(6, 4), (3, 4), *SIZES])
    lattices = made_bands(lattices, band, seed)
    reference = losses_of_bands(joint_arcs(tensors, lattices), lattices)
    weight = torch.linspace(0.5, 2.0, len(reference), dtype=reference.dtype)
    expected = torch.autograd.grad((weight * reference).sum(), tensors)
    smallest = max(lattices.widths or []) * 600  # a few cells, for many slices
    for budget in (ENOUGH, smallest):
        actual = transducer_loss(*tensors, lattices, budget)
        assert_same([actual], [reference], 1e-9)
        assert_same(torch.autograd.grad((weight * actual).sum(), tensors), expected, 1e-9)
    low = [tensor.detach().float().requires_grad_() for tensor in tensors]
    actual = transducer_loss(*low, lattices, ENOUGH)
    assert_same([actual.double()], [reference], 1e-5)
    grads = torch.autograd.grad((weight.float() * actual).sum(), low)
    assert_same([grad.double() for grad in grads], expected, 2e-5)
    assert (reference > torch.stack([brute_force_loss(part) for part in joint_arcs(tensors, lattices)])).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bands_are_chosen_by_the_simple_joint_networks_probabilities_without_a_graph(dtype: torch.dtype) -> None:
    network, frames, predicted, lattices, arcs = simple_parts(dtype)
    losses, banded = network(frames, predicted, lattices, band=2)
    assert losses.dtype == torch.promote_types(dtype, torch.float32) and losses.requires_grad
    assert banded.first_state is not None and banded.widths is not None
    for part, first, width in zip(arcs, banded.first_state, banded.widths, strict=True):
        frames_, states = part.shape[:2]
        assert width == band_width(frames_, states, 2)
        assert not first.requires_grad and first[0] == 0 and first[-1] == states - width
        if dtype == torch.float64:
            leaf = part.detach().requires_grad_()
            [grad] = torch.autograd.grad(brute_force_loss(leaf), leaf)
            assert torch.equal(first, choose_band(-grad.sum(dim=-1), width))
    with torch.no_grad():  # as in validation
        again, same = network(frames, predicted, lattices, band=2)
    assert torch.equal(again, losses) and same.widths == banded.widths


def test_a_batch_without_segments_gives_the_simple_joint_network_gradients_of_zero() -> None:
    network, frames, predicted, _, _ = simple_parts()
    losses, banded = network(frames[:0], predicted[:0], Lattices([], []), band=2)
    losses.sum().backward()
    assert banded.widths == [] and all(not parameter.grad.any() for parameter in network.parameters())
