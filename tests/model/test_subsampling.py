"""Subsampling of packed rows: receptive fields, and packed segments equal to each segment alone."""

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
    pytest.param(kind, stride, causal, id=f"{kind}-{stride}{'-causal' * causal}")
    for kind, stride in KINDS
    for causal in ((False,) if kind == "stacking" else (False, True))
]
for_all_variants = pytest.mark.parametrize("kind, stride, causal", VARIANTS)


def make_module(kind: str, stride: int, causal: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    settings = EncoderSettings(
        num_mels=MELS, dim=32, num_heads=2, subsampling=kind, subsampling_factor=stride, subsampling_channels=32,
        causal_convolution=causal,
    )  # fmt: skip
    return make_subsampling(settings).double()


def make_layout(rows: list[list[tuple[int, int]]], frames: int) -> Any:
    """`valid_mel` of a `RowLayout`, from rows of (start, length) in mel frames."""
    valid = torch.zeros(len(rows), frames, dtype=torch.bool)
    for row, segments in enumerate(rows):
        for start, length in segments:
            valid[row, start : start + length] = True
    return SimpleNamespace(valid_mel=valid)


def reach_of(kind: str, stride: int, causal: bool) -> tuple[int, int]:
    """Documented receptive field: mel frames before and after the `stride` frames of the target."""
    if kind == "stacking":
        return 0, 0
    return (stride - 1, 0) if causal else (stride // 2, stride // 2 - 1)


def convolve(x: Tensor, conv: nn.Module, ahead: bool) -> Tensor:
    """torch's 3 x 3 convolution of stride 2 of one segment, `[C, n, M] -> [C', ceil(n / 2), M / 2]`."""
    length = x.shape[1]
    after = length % 2 + ahead
    x = F.pad(x, (1, 1, 0 if ahead else 1, after))
    weight = conv.weight.view(-1, 1, 3, 3) if isinstance(conv, nn.Linear) else conv.weight
    return F.conv2d(x[None], weight, conv.bias, stride=2, groups=x.shape[0] // weight.shape[1])[0]


def reference(module: nn.Module, segment: Tensor, causal: bool) -> Tensor:
    """One segment alone by torch's convolutions, `[n, M] -> [ceil(n / stride), D]`."""
    if isinstance(module, Stacking):
        missing = -len(segment) % module.stride
        return module.out(F.pad(segment, (0, 0, 0, missing)).reshape(-1, module.stride * MELS))
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
def test_packed_segments_have_the_outputs_and_gradients_of_torchs_convolutions_of_each_alone(
    kind: str, stride: int, causal: bool
) -> None:
    module = make_module(kind, stride, causal)
    gap = 0 if kind == "stacking" else stride // 2  # the smallest that suffices
    frames = 16 * stride
    for length in [1, 2, *range(2 * stride, 3 * stride + 1)]:
        segment = torch.randn(length, MELS, dtype=torch.float64, requires_grad=True)
        alone = reference(module, segment, causal)
        weight = torch.randn_like(alone)
        expected_grads = torch.autograd.grad((alone * weight).sum(), (segment, *module.parameters()))

        start = 5 * stride
        next_start = -(-(start + length + gap) // stride) * stride
        layout = make_layout([[], [(next_start, 9), (start, length), (stride, 4 * stride - gap)]], frames)
        log_mel = torch.randn(2, frames, MELS, dtype=torch.float64) * 9
        log_mel[1, start : start + length] = segment.detach()
        log_mel.requires_grad_()
        packed = module(log_mel, layout)
        assert packed.shape == (2, frames // stride, 32) and bool(packed.isfinite().all())
        actual = packed[1, 5 : 5 + len(alone)]
        torch.testing.assert_close(actual, alone, rtol=1e-9, atol=1e-9)
        grad, *parameter_grads = torch.autograd.grad((actual * weight).sum(), (log_mel, *module.parameters()))
        expected = torch.zeros_like(grad)
        expected[1, start : start + length] = expected_grads[0]
        torch.testing.assert_close((grad, *parameter_grads), (expected, *expected_grads[1:]), rtol=1e-9, atol=1e-9)


@for_all_variants
def test_frames_depend_on_the_documented_mel_frames_only(kind: str, stride: int, causal: bool) -> None:
    module = make_module(kind, stride, causal)
    before, after = reach_of(kind, stride, causal)
    start = 2 * stride
    for length in range(5 * stride, 6 * stride):
        log_mel = torch.randn(1, 10 * stride, MELS, dtype=torch.float64, requires_grad=True)
        outputs = module(log_mel, make_layout([[(start, length)]], 10 * stride))[0]
        for t in range(-(-length // stride)):
            (grad,) = torch.autograd.grad(outputs[2 + t].pow(2).sum(), log_mel, retain_graph=True)
            first, last = max(stride * t - before, 0), min(stride * t + stride - 1 + after, length - 1)
            frames_used = grad[0].abs().sum(dim=1).nonzero().flatten().tolist()
            assert frames_used == list(range(start + first, start + last + 1))


def change_by_target(kind: str, stride: int, causal: bool, seed: int) -> Tensor:
    """Change of each of 5 encoder frames if the mel frames of target 2 are drawn again."""
    module = make_module(kind, stride, causal, seed)
    clean = torch.randn(1, 7 * stride, MELS, dtype=torch.float64)
    layout = make_layout([[(stride, 5 * stride - 1)]], 7 * stride)
    changed = clean.clone()
    changed[0, 3 * stride : 4 * stride] = torch.randn(stride, MELS, dtype=torch.float64)
    return (module(changed, layout) - module(clean, layout))[0, 1:6].norm(dim=-1)


@pytest.mark.parametrize("kind, stride", KINDS)
def test_mel_frames_of_target_t_change_encoder_frame_t_most(kind: str, stride: int) -> None:
    for seed in range(8):
        assert change_by_target(kind, stride, False, seed).argmax() == 2


@pytest.mark.parametrize("kind, stride", KINDS[:4])
def test_causal_mel_frames_of_target_t_change_frames_t_and_next_about_equally_and_no_other(
    kind: str, stride: int
) -> None:
    change = torch.stack([change_by_target(kind, stride, True, seed) for seed in range(8)]).square().mean(0).sqrt()
    assert change[:2].max() == 0 and change[4] == 0 and change[2] > 0.8 * change[3]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("bins", [5, 6])
def test_gradients_of_halving_match_torchs_convolution(bins: int, ahead: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, bins, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    halved = halve_depthwise(F.pad(x, (0, 0, 0, 0, 0, 1)) if ahead else x, weight, bias)
    padded = F.pad(x.permute(0, 3, 1, 2), (1, 1, 0, 1) if ahead else (1, 1, 1, 0))
    torchs = F.conv2d(padded, weight, bias, stride=2, groups=3).permute(0, 2, 3, 1)
    torch.testing.assert_close(halved, torchs, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(halved)
    actual, expected = (torch.autograd.grad(out, (x, weight, bias), grad) for out in (halved, torchs))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@for_all_variants
def test_bfloat16_error_is_at_most_that_of_torchs_convolutions(kind: str, stride: int, causal: bool) -> None:
    """Budget: 1.5 times the error of the reference at the same precision, against float64."""
    module = make_module(kind, stride, causal)
    log_mel = torch.randn(40 * stride, MELS).bfloat16().double()
    layout = make_layout([[(0, 40 * stride)]], 40 * stride)

    def outputs_and_gradients(use_reference: bool, low: bool) -> list[Tensor]:
        module.to(torch.float32 if low else torch.float64)
        x = log_mel.float() if low else log_mel
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = reference(module, x, causal) if use_reference else module(x[None], layout)[0]
        gradients = torch.autograd.grad(out.double().pow(2).sum(), list(module.parameters()))
        return [out.detach().double(), *(gradient.double() for gradient in gradients)]

    exact = outputs_and_gradients(True, False)
    actual, torchs = outputs_and_gradients(False, True), outputs_and_gradients(True, True)
    for truth, result, reference_result in zip(exact, actual, torchs, strict=True):
        assert (result - truth).norm() <= 1.5 * (reference_result - truth).norm()
    assert (actual[0] - exact[0]).norm() <= 0.01 * exact[0].norm()


def test_parameter_count_of_striding_matches_the_formula_of_fastconformer() -> None:
    channels, dim, mels, stride = 256, 512, 80, 8
    count = sum(parameter.numel() for parameter in Striding(mels, channels, dim, stride).parameters())
    full = 9 * channels + channels
    separable = (9 * channels + channels) + (channels * channels + channels)
    assert count == full + 2 * separable + (mels // stride * channels * dim + dim) == 1_450_496


def test_parameter_names_match_those_of_earlier_checkpoints() -> None:
    names = [name for name, _ in make_module("convolutional", 4, False).named_parameters()]
    assert names == [f"{part}.{kind}" for part in ("conv1", "conv2", "out") for kind in ("weight", "bias")]
