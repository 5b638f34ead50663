"""Subsampling over packed rows: what a frame sees, and that a segment comes out as it does alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model.settings import EncoderSettings
from bestrq.model.subsampling import Stacking, Striding, halve_depthwise, make_subsampling

MELS = 12
KINDS = [
    ("convolutional", 4),
    ("striding", 2),
    ("striding", 4),
    ("striding", 8),
    ("stacking", 2),
    ("stacking", 4),
    ("stacking", 8),
]
VARIANTS = [
    pytest.param(kind, factor, causal, id=f"{kind}-{factor}{'-causal' * causal}")
    for kind, factor in KINDS
    for causal in ((False,) if kind == "stacking" else (False, True))
]
for_all_variants = pytest.mark.parametrize("kind, factor, causal", VARIANTS)


def make_module(kind: str, factor: int, causal: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    settings = EncoderSettings(
        num_mels=MELS, dim=32, num_heads=2, subsampling=kind, subsampling_factor=factor, subsampling_channels=32,
        causal_convolution=causal,
    )  # fmt: skip
    return make_subsampling(settings).double()


def make_layout(rows: list[list[tuple[int, int]]], frames: int) -> Any:
    """A `RowLayout`'s `valid_mel` of rows of (start, length) in mel frames."""
    valid = torch.zeros(len(rows), frames, dtype=torch.bool)
    for row, segments in enumerate(rows):
        for start, length in segments:
            valid[row, start : start + length] = True
    return SimpleNamespace(valid_mel=valid)


def reach_of(kind: str, factor: int, causal: bool) -> tuple[int, int]:
    """Mel frames that a frame sees before and behind the `factor` frames of its target, as documented."""
    if kind == "stacking":
        return 0, 0
    return (factor - 1, 0) if causal else (factor // 2, factor // 2 - 1)


def convolve(x: Tensor, conv: nn.Module, ahead: bool) -> Tensor:
    """A 3 x 3 convolution of stride 2 of one segment `[C, n, M]`, by torch's, to `[C', ceil(n / 2), M / 2]`."""
    length = x.shape[1]
    behind = length % 2 + ahead
    x = F.pad(x, (1, 1, 0 if ahead else 1, behind))
    weight = conv.weight.view(-1, 1, 3, 3) if isinstance(conv, nn.Linear) else conv.weight
    return F.conv2d(x[None], weight, conv.bias, stride=2, groups=x.shape[0] // weight.shape[1])[0]


def reference(module: nn.Module, segment: Tensor, causal: bool) -> Tensor:
    """One segment `[n, M]` alone to `[ceil(n / factor), D]`, by torch's convolutions."""
    if isinstance(module, Stacking):
        missing = -len(segment) % module.factor
        return module.out(F.pad(segment, (0, 0, 0, missing)).reshape(-1, module.factor * MELS))
    depthwise = list(module.depthwise) if isinstance(module, Striding) else []
    single = isinstance(module, Striding) and not depthwise
    x = F.relu(convolve(segment[None], module.conv1, not causal and not single))
    if isinstance(module, Striding):
        for number, (depthwise, pointwise) in enumerate(zip(module.depthwise, module.pointwise, strict=True)):
            x = convolve(x, depthwise, not causal and number < len(module.depthwise) - 1)
            x = F.relu(F.conv2d(x[None], pointwise.weight[..., None, None], pointwise.bias)[0])
    else:
        x = F.relu(convolve(x, module.conv2, False))
    return module.out(x.permute(1, 2, 0).flatten(1))


@for_all_variants
def test_packed_segment_comes_out_as_alone_by_torchs_convolutions_with_the_same_gradients(
    kind: str, factor: int, causal: bool
) -> None:
    module = make_module(kind, factor, causal)
    gap = 0 if kind == "stacking" else factor // 2  # the least that suffices
    frames = 16 * factor
    for length in [1, 2, *range(2 * factor, 3 * factor + 1)]:
        segment = torch.randn(length, MELS, dtype=torch.float64, requires_grad=True)
        alone = reference(module, segment, causal)
        weight = torch.randn_like(alone)
        want = torch.autograd.grad((alone * weight).sum(), (segment, *module.parameters()))

        start = 5 * factor
        behind = -(-(start + length + gap) // factor) * factor
        layout = make_layout([[], [(behind, 9), (start, length), (factor, 4 * factor - gap)]], frames)
        log_mel = torch.randn(2, frames, MELS, dtype=torch.float64) * 9
        log_mel[1, start : start + length] = segment.detach()
        log_mel.requires_grad_()
        packed = module(log_mel, layout)
        assert packed.shape == (2, frames // factor, 32) and bool(packed.isfinite().all())
        got = packed[1, 5 : 5 + len(alone)]
        torch.testing.assert_close(got, alone, rtol=1e-9, atol=1e-9)
        grad, *parameter_grads = torch.autograd.grad((got * weight).sum(), (log_mel, *module.parameters()))
        expected = torch.zeros_like(grad)
        expected[1, start : start + length] = want[0]
        torch.testing.assert_close((grad, *parameter_grads), (expected, *want[1:]), rtol=1e-9, atol=1e-9)


@for_all_variants
def test_frame_sees_the_documented_mel_frames_and_no_other(kind: str, factor: int, causal: bool) -> None:
    module = make_module(kind, factor, causal)
    before, behind = reach_of(kind, factor, causal)
    start = 2 * factor
    for length in range(5 * factor, 6 * factor):
        log_mel = torch.randn(1, 10 * factor, MELS, dtype=torch.float64, requires_grad=True)
        outputs = module(log_mel, make_layout([[(start, length)]], 10 * factor))[0]
        for t in range(-(-length // factor)):
            (grad,) = torch.autograd.grad(outputs[2 + t].pow(2).sum(), log_mel, retain_graph=True)
            first, last = max(factor * t - before, 0), min(factor * t + factor - 1 + behind, length - 1)
            seen = grad[0].abs().sum(dim=1).nonzero().flatten().tolist()
            assert seen == list(range(start + first, start + last + 1))


def moved_by_target(kind: str, factor: int, causal: bool, seed: int) -> Tensor:
    """How far each of 5 encoder frames moves when the mel frames of target 2 are drawn anew."""
    module = make_module(kind, factor, causal, seed)
    clean = torch.randn(1, 7 * factor, MELS, dtype=torch.float64)
    layout = make_layout([[(factor, 5 * factor - 1)]], 7 * factor)
    changed = clean.clone()
    changed[0, 3 * factor : 4 * factor] = torch.randn(factor, MELS, dtype=torch.float64)
    return (module(changed, layout) - module(clean, layout))[0, 1:6].norm(dim=-1)


@pytest.mark.parametrize("kind, factor", KINDS)
def test_mel_frames_of_target_t_move_encoder_frame_t_most(kind: str, factor: int) -> None:
    for seed in range(8):
        assert moved_by_target(kind, factor, False, seed).argmax() == 2


@pytest.mark.parametrize("kind, factor", KINDS[:4])
def test_causal_mel_frames_of_target_t_move_frame_t_about_as_much_as_the_next_and_no_other(
    kind: str, factor: int
) -> None:
    moved = torch.stack([moved_by_target(kind, factor, True, seed) for seed in range(8)]).square().mean(0).sqrt()
    assert moved[:2].max() == 0 and moved[4] == 0 and moved[2] > 0.8 * moved[3]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("bins", [5, 6])
def test_gradients_of_halving_are_those_of_torchs_convolution(bins: int, ahead: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, bins, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    ours = halve_depthwise(F.pad(x, (0, 0, 0, 0, 0, 1)) if ahead else x, weight, bias)
    padded = F.pad(x.permute(0, 3, 1, 2), (1, 1, 0, 1) if ahead else (1, 1, 1, 0))
    torchs = F.conv2d(padded, weight, bias, stride=2, groups=3).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(ours)
    got, want = (torch.autograd.grad(out, (x, weight, bias), grad) for out in (ours, torchs))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@for_all_variants
def test_bfloat16_error_is_that_of_torchs_convolutions(kind: str, factor: int, causal: bool) -> None:
    """Budget: 1.5 times the error of the reference at the same precision, against float64."""
    module = make_module(kind, factor, causal)
    log_mel = torch.randn(40 * factor, MELS).bfloat16().double()
    layout = make_layout([[(0, 40 * factor)]], 40 * factor)

    def outputs_and_gradients(use_reference: bool, low: bool) -> list[Tensor]:
        module.to(torch.float32 if low else torch.float64)
        x = log_mel.float() if low else log_mel
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = reference(module, x, causal) if use_reference else module(x[None], layout)[0]
        gradients = torch.autograd.grad(out.double().pow(2).sum(), list(module.parameters()))
        return [out.detach().double(), *(gradient.double() for gradient in gradients)]

    exact = outputs_and_gradients(True, False)
    ours, torchs = outputs_and_gradients(False, True), outputs_and_gradients(True, True)
    for truth, mine, theirs in zip(exact, ours, torchs, strict=True):
        assert (mine - truth).norm() <= 1.5 * (theirs - truth).norm()
    assert (ours[0] - exact[0]).norm() <= 0.01 * exact[0].norm()


def test_parameters_of_fastconformers_striding_are_those_of_its_formula() -> None:
    channels, dim, mels, factor = 256, 512, 80, 8
    count = sum(parameter.numel() for parameter in Striding(mels, channels, dim, factor).parameters())
    full = 9 * channels + channels
    separable = (9 * channels + channels) + (channels * channels + channels)
    assert count == full + 2 * separable + (mels // factor * channels * dim + dim) == 1_450_496


def test_names_of_the_parameters_stay_those_of_earlier_checkpoints() -> None:
    names = [name for name, _ in make_module("convolutional", 4, False).named_parameters()]
    assert names == [f"{part}.{kind}" for part in ("conv1", "conv2", "out") for kind in ("weight", "bias")]
