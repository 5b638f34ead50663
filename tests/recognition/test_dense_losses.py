"""RNN-T and TDT losses of given outputs: against all alignments enumerated, other implementations, and wrong inputs."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bestrq.recognition.losses import dense
from bestrq.recognition.losses.dense import NemoRNNTLoss, NemoTDTLoss, rnnt_loss, tdt_loss
from common.errors import UserError
from pipelines.live_bytes import LiveBytes
from tests.lattices import alignments as plain_alignments
from tests.lattices import assert_same
from tests.recognition.test_tdt_loss import alignments

VOCAB = 5
SIZES = [(4, 2), (3, 0), (1, 3), (1, 0), (2, 3), (4, 3)]
"""(T, U): no labels, one frame, both, more labels than frames; padded to (4, 3)"""
LENGTHS = torch.tensor(SIZES).unbind(1)
DURATIONS = [0, 1, 3]
REDUCED: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda losses: losses,
    "sum": lambda losses: losses.sum(),
    "mean_batch": lambda losses: losses.mean(),
    "mean_volume": lambda losses: losses.sum() / 11,
}


def make_outputs(dtype: torch.dtype = torch.float64, blank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of tokens and of durations, with gradients, and targets."""
    generator = torch.Generator().manual_seed(0)
    sizes = (len(SIZES), 4, 4)
    tokens, spans = (
        torch.randn(*sizes, width, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for width in (VOCAB, len(DURATIONS))
    )
    targets = torch.randint(0, VOCAB - 1, (len(SIZES), 3), generator=generator)
    return tokens, spans, targets + (targets >= blank)


def enumerated(tokens: Tensor, spans: Tensor | None, targets: Tensor, blank: int, sigma: float = 0.0) -> Tensor:
    """Negative log of the summed probability of all paths, one by one, `[B]`."""
    token_scores = tokens.log_softmax(-1) - sigma
    losses = []
    for b, (frames, count) in enumerate(SIZES):
        scores = []
        if spans is None:
            for path in plain_alignments(frames, count):
                scores.append(sum(token_scores[b, t, u, targets[b, u] if label else blank] for t, u, label in path))
        else:
            span_scores = spans.log_softmax(-1)
            for arcs in alignments(frames, count, DURATIONS):
                parts = [
                    token_scores[b, t, u, targets[b, u] if label else blank] + span_scores[b, t, u, index]
                    for t, u, label, index in arcs
                ]
                scores.append(torch.stack(parts).sum())
        losses.append(-torch.stack([torch.as_tensor(score) for score in scores]).logsumexp(dim=0))
    return torch.stack(losses)


def with_gradients(losses: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Losses, and gradients of their sum with a different weight for every segment."""
    weights = torch.arange(1, 1 + losses.numel()).to(losses).view_as(losses)
    return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), inputs)]


@pytest.mark.parametrize("blank", [0, 2, VOCAB - 1])
@pytest.mark.parametrize("reduction", REDUCED)
def test_rnnt_losses_and_gradients_equal_those_of_all_alignments_enumerated(blank: int, reduction: str) -> None:
    tokens, _, targets = make_outputs(blank=blank)
    actual = rnnt_loss(tokens, targets, *LENGTHS, blank, reduction)
    assert actual.dtype == torch.float64
    expected = REDUCED[reduction](enumerated(tokens, None, targets, blank))
    assert_same(with_gradients(actual, [tokens]), with_gradients(expected, [tokens]), 1e-10)


@pytest.mark.parametrize("blank", [0, 2, VOCAB - 1])
@pytest.mark.parametrize(("reduction", "sigma"), [*zip(REDUCED, [0.05, 0.0, 0.05, 0.0], strict=True)])
def test_tdt_losses_and_gradients_equal_those_of_all_alignments_enumerated(
    blank: int, reduction: str, sigma: float
) -> None:
    tokens, spans, targets = make_outputs(blank=blank)
    actual = tdt_loss(tokens, spans, targets, *LENGTHS, blank, DURATIONS, sigma, reduction)
    expected = REDUCED[reduction](enumerated(tokens, spans, targets, blank, sigma))
    assert_same(with_gradients(actual, [tokens, spans]), with_gradients(expected, [tokens, spans]), 1e-10)


def test_mean_divides_every_loss_by_its_labels() -> None:
    tokens, _, targets = make_outputs()
    used = [0, 2, 4, 5]
    losses = enumerated(tokens, None, targets, 0)[used]
    actual = rnnt_loss(tokens[used], targets[used], *(length[used] for length in LENGTHS), 0, "mean")
    assert_same([actual], [(losses / LENGTHS[1][used]).mean()])


@pytest.mark.parametrize("slice_bytes", [1, 200, 2**20])
def test_slices_of_any_size_give_the_same_gradients(slice_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, spans, targets = make_outputs()
    monkeypatch.setattr(dense, "SLICE_BYTES", slice_bytes)
    actual = tdt_loss(tokens, spans, targets, *LENGTHS, 0, DURATIONS, reduction="none")
    expected = enumerated(tokens, spans, targets, 0)
    assert_same(with_gradients(actual, [tokens, spans]), with_gradients(expected, [tokens, spans]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_outputs_give_float32_losses_and_gradients_in_their_dtype(dtype: torch.dtype) -> None:
    tokens, spans, targets = make_outputs(dtype)
    actual = with_gradients(tdt_loss(tokens, spans, targets, *LENGTHS, 0, DURATIONS, 0.0, "none"), [tokens, spans])
    assert [tensor.dtype for tensor in actual] == [torch.float32, dtype, dtype]
    wide = [tensor.detach().double().requires_grad_() for tensor in (tokens, spans)]
    expected = with_gradients(enumerated(wide[0], wide[1], targets, 0), wide)
    for result, reference, tolerance in zip(actual, expected, (1e-5, 0.02, 0.02), strict=True):
        torch.testing.assert_close(result.double(), reference, rtol=tolerance, atol=tolerance)


def test_memory_beside_the_gradient_is_a_few_slices_for_any_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "SLICE_BYTES", 2**16)
    shape = (2, 40, 11)
    tokens, spans = torch.randn(*shape, 500, requires_grad=True), torch.randn(*shape, 3, requires_grad=True)
    targets, lengths = torch.ones(2, 10, dtype=torch.int64), (torch.tensor([40, 30]), torch.tensor([10, 8]))
    live = LiveBytes()
    with live:
        tdt_loss(tokens, spans, targets, *lengths, 0, DURATIONS).backward()
    gradients, cells = 4 * 2 * 40 * 11 * (500 + 3), 40 * 11 + 30 * 9
    # Arcs, scores and their gradients take (7 + 2 D) numbers per cell, twice in the padded diagonals.
    assert live.peak <= gradients + 2 * 2**16 + cells * 4 * 2 * (7 + 2 * 3) + 2**13


def test_nemo_arguments_give_the_same_losses() -> None:
    tokens, spans, targets = make_outputs(blank=VOCAB - 1)
    plain = NemoRNNTLoss(blank=VOCAB - 1, reduction="mean_volume")
    actual = plain(acts=tokens, labels=targets, act_lens=LENGTHS[0], label_lens=LENGTHS[1])
    assert_same([actual], [rnnt_loss(tokens, targets, *LENGTHS, VOCAB - 1)])
    both = torch.cat((tokens, spans), dim=-1)
    for reduction in ("sum", None):
        loss = NemoTDTLoss(blank=VOCAB - 1, durations=DURATIONS, reduction=reduction, sigma=0.05)
        actual = loss(acts=both, labels=targets, act_lens=LENGTHS[0], label_lens=LENGTHS[1])
        expected = enumerated(tokens, spans, targets, VOCAB - 1, 0.05)
        assert_same([actual], [expected.sum() if reduction else expected])


def test_transformers_has_the_same_losses_and_gradients() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed here")
    theirs = importlib.import_module("transformers.loss.loss_tdt").tdt_loss
    tokens, spans, targets = make_outputs(torch.float32, blank=VOCAB - 1)
    for reduction in ("sum", "mean_batch", "mean_volume", "none"):
        arguments: dict[str, Any] = {
            "token_logits": tokens, "duration_logits": spans, "targets": targets, "logit_lengths": LENGTHS[0],
            "target_lengths": LENGTHS[1], "blank_token_id": VOCAB - 1, "durations": DURATIONS, "sigma": 0.05,
            "reduction": reduction,
        }  # fmt: skip
        losses = [with_gradients(loss(**arguments), [tokens, spans]) for loss in (tdt_loss, theirs)]
        assert_same(losses[0], losses[1], 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "average"}, "reduction is 'average': give one of mean_volume"),
        ({"durations": [1, 2, 3]}, "start with 0 and 1"),
        ({"durations": [0, 1]}, r"duration_logits has the shape \[6, 4, 4, 3\]: give \[6, 4, 4, 2\]"),
        ({"targets": torch.ones(6, 2, dtype=torch.int64)}, r"targets has the shape \[6, 2\]: .* need \[6, 3\]"),
        ({"blank_token_id": 5}, "blank_token_id is 5: give 0 to 4"),
        ({"logit_lengths": torch.tensor([4, 3, 1, 0, 2, 4])}, r"logit_lengths is \[4, 3, 1, 0, 2, 4\]: .* from 1 to 4"),
        ({"target_lengths": torch.tensor([4, 0, 0, 0, 0, 0])}, r"target_lengths is .* from 0 to 3"),
        ({"target_lengths": torch.tensor([3])}, r"target_lengths is \[3\]: .* each of 6 segments"),
        ({"targets": torch.zeros(6, 3, dtype=torch.int64)}, "label 0 at position 0 of segment 0: .* the blank"),
        ({"targets": torch.full((6, 3), 5)}, "label 5 at position 0 of segment 0: give 0 to 4"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    tokens, spans, targets = make_outputs()
    arguments: dict[str, Any] = {
        "token_logits": tokens, "duration_logits": spans, "targets": targets, "logit_lengths": LENGTHS[0],
        "target_lengths": LENGTHS[1], "blank_token_id": 0, "durations": DURATIONS,
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        tdt_loss(**{**arguments, **changes})
