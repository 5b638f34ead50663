"""Closed forms for span masks against drawn masks and against sums over all cases."""

import itertools

import numpy as np
import pytest
import torch

from bestrq.pretraining.mask_shares import masked_share, mean_run, segment_share, target_share
from bestrq.pretraining.masking import draw_span_mask, num_runs
from bestrq.pretraining.objective import target_frame_mask
from common.segments import Segments


def all_masked(starts: tuple[int, ...], span: int, stride: int) -> bool:
    """Whether each of the last `stride` frames has a start among the last `span` frames, itself included."""
    return all(any(starts[t : t + span]) for t in range(stride))


@pytest.mark.parametrize(("p", "span", "stride"), [(0.3, 5, 4), (0.2, 4, 5), (0.5, 3, 1), (0.1, 7, 8)])
def test_target_share_is_the_sum_over_all_starts(p: float, span: int, stride: int) -> None:
    """Probability over all 2^(span + stride - 1) patterns of starts that reach the stack."""
    total = 0.0
    for starts in itertools.product((0, 1), repeat=span + stride - 1):
        if all_masked(starts, span, stride):
            total += p ** sum(starts) * (1 - p) ** (len(starts) - sum(starts))
    assert target_share(p, span, stride) == pytest.approx(total, rel=1e-12)


def test_one_frame_per_stack_is_the_masked_share() -> None:
    assert target_share(0.01, 40, 1) == pytest.approx(masked_share(0.01, 40), rel=1e-12)
    assert masked_share(0.01, 40) == pytest.approx(0.331, abs=5e-4)


def test_a_stride_beyond_the_formula_is_refused() -> None:
    with pytest.raises(ValueError, match="stride is 8, span 6"):
        target_share(0.1, 6, 8)


@pytest.mark.parametrize(("p", "span", "stride"), [(0.01, 40, 4), (0.0125, 40, 8), (0.03, 16, 8)])
def test_shares_and_runs_of_long_masks_are_those_of_the_formulas(p: float, span: int, stride: int) -> None:
    frames = 4_000_000
    mask = torch.from_numpy(draw_span_mask(np.random.default_rng(5), frames, span, p))[None]
    targets = target_frame_mask(mask, Segments(torch.tensor([[0]]), torch.tensor([[frames]]), frames), stride)
    assert float(mask.double().mean()) == pytest.approx(masked_share(p, span), rel=0.01)
    assert float(targets.double().mean()) == pytest.approx(target_share(p, span, stride), rel=0.015)
    assert int(mask.sum()) / num_runs(mask) == pytest.approx(mean_run(p, span), rel=0.015)


@pytest.mark.parametrize(("frames", "p"), [(39, 0.4), (40, 0.4), (60, 0.05), (400, 0.02)])
def test_the_share_of_a_short_segment_includes_its_edges(frames: int, p: float) -> None:
    generator = np.random.default_rng(6)
    masks = [draw_span_mask(generator, frames, 40, p).mean() for _ in range(20_000)]
    assert segment_share(frames, p, 40) == pytest.approx(float(np.mean(masks)), rel=0.02)


def test_the_share_of_a_long_segment_is_that_without_edges() -> None:
    assert segment_share(200_000, 0.01, 40) == pytest.approx(masked_share(0.01, 40), rel=1e-3)
