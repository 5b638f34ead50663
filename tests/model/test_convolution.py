"""Convolution module on packed rows against plain convolutions of each segment: causal, with a stride, streaming."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.model.batch_norm import MaskedBatchNorm
from bestrq.model.convolution import ConvolutionModule, convolve_in_segments, depthwise
from bestrq.model.streaming import stream_convolution
from bestrq.training.process import World
from tests.gloo import run_distributed

Rows = list[list[tuple[int, int]]]
"""(start, length) of the segments of each row, in frames; a length of 0 marks an unused slot"""

ROWS: Rows = [[(0, 11), (12, 1), (14, 10)], [(20, 4), (0, 15), (0, 0)], [(0, 0)] * 3]
FRAMES = 24


def make_layout(rows: Rows, frames: int, reach: int) -> Any:
    """`valid` and `convolution` of a `StageLayout`, built segment by segment."""
    places = frames + (len(rows[0]) - 1) * reach
    valid, occupied = (torch.zeros(len(rows), n, dtype=torch.bool) for n in (frames, places))
    place, frame = (torch.zeros(len(rows), n, dtype=torch.int64) for n in (frames, places))
    for number, row in enumerate(rows):
        for order, (start, length) in enumerate(sorted(part for part in row if part[1])):
            for t in range(start, start + length):
                valid[number, t] = occupied[number, t + order * reach] = True
                place[number, t] = number * places + t + order * reach
                frame[number, t + order * reach] = number * frames + t
    # Places of gaps and frames of empty places are arbitrary.
    spread = SimpleNamespace(
        frame=frame.flatten(), place=place.flatten(), valid=valid.view(-1, 1), occupied=occupied.view(-1, 1)
    )
    return SimpleNamespace(valid=valid, convolution=spread)


def make_module(kernel_size: int = 5, norm: str = "layer_norm", **options: Any) -> ConvolutionModule:
    torch.manual_seed(0)
    return ConvolutionModule(6, kernel_size, norm, **options).double().eval()


def reach_of(module: ConvolutionModule) -> int:
    return (module.depthwise.kernel_size[0] - 1) // (1 if module.causal else 2)


def plain(module: ConvolutionModule, x: Tensor) -> Tensor:
    """Reference: one segment `[n, D]` alone, frame by frame."""
    gated = F.glu(module.pointwise_in(x), dim=-1)
    weight, kernel_size = module.depthwise.weight[:, 0], module.depthwise.kernel_size[0]
    outputs = []
    for own in range(0, len(x), module.stride):
        last = own + (min(module.stride, kernel_size) - 1 if module.causal else kernel_size // 2)
        output = module.depthwise.bias
        for tap in range(kernel_size):
            if 0 <= last - kernel_size + 1 + tap < len(x):
                output = output + weight[:, tap] * gated[last - kernel_size + 1 + tap]
        outputs.append(output)
    return module.pointwise_out(F.silu(module.norm(torch.stack(outputs))))


VARIANTS = [(causal, stride) for causal in (False, True) for stride in (1, 2)]


@pytest.mark.parametrize("kernel_size", [1, 5, 31])
@pytest.mark.parametrize("causal, stride", VARIANTS)
def test_packed_segments_have_the_outputs_and_gradients_of_each_alone(
    causal: bool, stride: int, kernel_size: int
) -> None:
    module = make_module(kernel_size, causal=causal, stride=stride, dim_out=8)
    layout = make_layout(ROWS, FRAMES, reach_of(module))
    x = (torch.randn(3, FRAMES, 6, dtype=torch.float64) * 3).requires_grad_()
    packed = module(x, layout)
    assert packed.shape == (3, FRAMES // stride, 8)
    for row, segments in enumerate(ROWS):
        for start, length in segments:
            if not length:
                continue
            alone = x[row, start : start + length].detach().requires_grad_()
            expected = plain(module, alone)
            actual = packed[row, start // stride : start // stride + len(expected)]
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
            weight = torch.randn_like(expected)
            alone_grads = torch.autograd.grad((expected * weight).sum(), (alone, *module.parameters()))
            packed_grads = torch.autograd.grad((actual * weight).sum(), (x, *module.parameters()), retain_graph=True)
            inside = torch.zeros_like(x)
            inside[row, start : start + length] = alone_grads[0]
            torch.testing.assert_close(packed_grads, (inside, *alone_grads[1:]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("causal, stride", VARIANTS)
def test_outputs_depend_on_the_documented_frames_only(causal: bool, stride: int, kernel_size: int) -> None:
    module = make_module(kernel_size, causal=causal, stride=stride)
    x = torch.randn(1, 20, 6, dtype=torch.float64, requires_grad=True)
    start, length = 4, 13
    outputs = module(x, make_layout([[(start, length)]], 20, reach_of(module)))
    for u in range(-(-length // stride)):
        (grad,) = torch.autograd.grad(outputs[0, start // stride + u].pow(2).sum(), x, retain_graph=True)
        last = stride * u + (stride - 1 if causal else kernel_size // 2)
        covered = range(max(last - kernel_size + 1, 0), min(last, length - 1) + 1)
        assert grad[0].abs().sum(1).nonzero().flatten().tolist() == [start + t for t in covered]
        assert not causal or max(covered) < stride * (u + 1)


@pytest.mark.parametrize("kernel_size", [1, 5, 31])
@pytest.mark.parametrize("ahead_share", [0, 1])
def test_gradients_of_the_depthwise_convolution_match_its_outputs(kernel_size: int, ahead_share: int) -> None:
    torch.manual_seed(0)
    ahead = ahead_share * (kernel_size // 2)
    rows: Rows = [[(4, 2), (0, 3)], [(1, 5), (0, 0)]]
    layout = make_layout(rows, 7, kernel_size - 1 - ahead).convolution
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 2), (2, 1, kernel_size))
    ]
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *args: convolve_in_segments(*args, layout, ahead), (*inputs, bias))
    valid = make_layout(rows, 7, 0).valid
    assert convolve_in_segments(*inputs, bias, layout, ahead)[~valid].abs().max() == 0


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "batch_norm"])
@pytest.mark.parametrize("chunks", [[1] * 40, [7, 1, 20, 12], [40]], ids=["frames", "chunks", "whole"])
@pytest.mark.parametrize("kernel_size", [1, 9])
def test_stream_of_chunks_equals_the_one_pass_output(kernel_size: int, chunks: list[int], norm: str) -> None:
    module = make_module(kernel_size, norm, causal=True)
    if isinstance(module.norm, MaskedBatchNorm):
        torch.nn.init.uniform_(module.norm.running_mean)
    x = torch.randn(1, 40, 6, dtype=torch.float64)
    whole = module(x, make_layout([[(0, 40)]], 40, kernel_size - 1))
    cache, outputs = x.new_zeros(1, kernel_size - 1, 6), []
    for chunk in x.split(chunks, dim=1):
        out, cache = stream_convolution(module, chunk, cache)
        assert cache.shape == (1, kernel_size - 1, 6)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal, stride", VARIANTS)
def test_statistics_of_batch_norm_exclude_gaps(causal: bool, stride: int) -> None:
    module = make_module(norm="batch_norm", causal=causal, stride=stride).train()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, FRAMES, 6, dtype=torch.float64, generator=generator)
    layout = make_layout(ROWS, FRAMES, reach_of(module))
    short = module(x, layout)[layout.valid[:, ::stride]]
    padded = F.pad(torch.where(layout.valid[..., None], x, 100.0), (0, 0, 0, 50), value=100.0)
    layout = make_layout(ROWS, FRAMES + 50, reach_of(module))
    long = module(padded, layout)[layout.valid[:, ::stride]]
    torch.testing.assert_close(short, long, rtol=1e-12, atol=1e-12)


def test_parameter_names_of_a_checkpoint_do_not_depend_on_the_variant() -> None:
    names = {name for name, _ in make_module().named_parameters()}
    expected = {f"{part}.{kind}" for part in ("pointwise_in", "depthwise", "norm", "pointwise_out")
                for kind in ("weight", "bias")}  # fmt: skip
    assert names == expected
    for causal, stride in VARIANTS:
        module = make_module(norm="batch_norm", causal=causal, stride=stride)
        assert {name for name, _ in module.named_parameters()} == expected


def test_the_gradient_of_the_depthwise_weight_has_the_weights_strides() -> None:
    """With other strides, DDP would warn at every start and copy gradients."""
    weight = torch.randn(6, 1, 5, requires_grad=True)
    out = depthwise(torch.randn(2, 9, 6), weight, torch.zeros(6), 2)
    out.sum().backward()
    assert weight.grad is not None and weight.grad.stride() == weight.stride()


def convolve_few_channels(world: World, dim: int, kernel: int) -> float:
    torch.manual_seed(0)
    values = [torch.randn(2, 160, dim), torch.randn(dim, 1, kernel), torch.randn(dim)]
    inputs = [value.bfloat16().requires_grad_() for value in values]
    with torch.autocast("cpu", torch.bfloat16):
        output = depthwise(*inputs, kernel // 2)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in inputs)
    expected = depthwise(*(value.detach().float() for value in inputs), kernel // 2)
    return float((output.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("dim", "kernel"), [(16, 31), (8, 15), (17, 31)])
def test_few_channels_are_convolved_in_bfloat16(dim: int, kernel: int) -> None:
    """In a separate process, as the oneDNN call that must be avoided hangs."""
    assert run_distributed(convolve_few_channels, 1, dim, kernel)[0] < 0.01
