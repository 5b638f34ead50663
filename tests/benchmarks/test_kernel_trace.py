"""FLOPs, bytes and fusion of recorded operators on small graphs, against numbers worked out by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_trace import Kernel, KernelTrace, Operator, fuse
from pipelines.fake_gpu import fake_gpu, unmasked_attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: see cuda_runtime.py")

BF16 = torch.bfloat16


def record(graph: Callable[..., object], *shapes: tuple[int, ...], share: float = 1.0) -> list[Operator]:
    """Operators of `graph` on bfloat16 tensors of these shapes."""
    trace = KernelTrace(share)
    with fake_gpu():
        inputs = [torch.empty(shape, dtype=BF16, device="cuda") for shape in shapes]
        with trace.phase("forward"):
            kept = graph(*inputs)
    del kept
    return trace.operators


def compiled(operators: list[Operator]) -> list[Kernel]:
    return fuse(operators, lambda operator: "all")


def names(kernels: list[Kernel]) -> list[list[str]]:
    return [[operator.name for operator in kernel.operators] for kernel in kernels]


def test_flops_and_bytes_of_a_product() -> None:
    (product,) = record(lambda x, w: x @ w.t(), (6, 8), (16, 8))
    (kernel,) = fuse([product], lambda _: "")
    assert kernel.flops == 2 * 6 * 8 * 16
    assert kernel.size == 2 * (6 * 8 + 8 * 16 + 6 * 16)
    assert product.products == [(1, 6, 16, 8)]


def test_views_and_allocations_are_no_kernels() -> None:
    assert record(lambda x: x.view(3, 16).t()[1:].unsqueeze(0).expand(4, -1, -1).detach(), (6, 8)) == []
    assert record(torch.empty_like, (6, 8)) == []


def test_repeated_elements_are_read_once() -> None:
    (kernel,) = fuse(record(lambda x, y: x[:1].expand(5, 8) + y, (4, 8), (5, 8)), lambda _: "")
    assert kernel.size == 2 * (8 + 40 + 40)
    (kernel,) = fuse(record(lambda x: x * x, (5, 8)), lambda _: "")
    assert kernel.size == 2 * (40 + 40)


def test_an_operator_in_place_reads_what_it_changes_and_a_copy_does_not() -> None:
    (kernel,) = fuse(record(lambda x, y: x.add_(y), (5, 8), (5, 8)), lambda _: "")
    assert kernel.size == 2 * 3 * 40
    (kernel,) = fuse(record(lambda x, y: x.copy_(y), (5, 8), (5, 8)), lambda _: "")
    assert kernel.size == 2 * 2 * 40


def test_a_gather_reads_the_rows_that_it_returns() -> None:
    rows = torch.zeros(3, dtype=torch.int64)

    def gather(x: Tensor) -> Tensor:
        return x.index_select(0, rows.to("cuda"))

    *_, kernel = fuse(record(gather, (100, 8)), lambda _: "")
    assert kernel.size == 3 * 8 + 2 * 2 * 3 * 8


def test_a_chain_between_products_reads_its_inputs_and_writes_its_outputs_once() -> None:
    def graph(x: Tensor, w: Tensor, v: Tensor, y: Tensor) -> Tensor:
        return ((F.silu(x @ w) * 2).float() + y).to(BF16) @ v

    kernels = compiled(record(graph, (6, 8), (8, 16), (16, 4), (6, 16)))
    assert names(kernels) == [["mm"], ["silu", "mul", "_to_copy", "add", "_to_copy"], ["mm"]]
    assert kernels[1].size == 2 * (96 + 96 + 96)
    assert [kernel.launches for kernel in kernels] == [1, 1, 1]
    eager = fuse(record(graph, (6, 8), (8, 16), (16, 4), (6, 16)), lambda _: "")
    assert sum(kernel.size for kernel in eager[1:-1]) == 192 * (2 + 2 + (1 + 2) + (2 + 1 + 2) + (2 + 1))


def test_results_that_are_read_outside_are_written() -> None:
    def graph(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(x)
        return hidden @ w, hidden * 2  # the product reads what the chain has computed on its way

    kernels = compiled(record(lambda x, w: (graph(x, w)[0] @ w, w), (8, 8), (8, 8)))
    assert names(kernels)[0] == ["silu", "mul"]
    assert kernels[0].size == 2 * 64 * 2  # reads x, writes the hidden values; nothing reads their double


def test_regions_are_not_fused_with_each_other() -> None:
    operators = record(lambda x: F.silu(x) * 2, (8, 8))
    halves = [replace(operators[0], block="first"), replace(operators[1], block="second")]
    assert names(fuse(halves, lambda operator: operator.block)) == [["silu"], ["mul"]]
    assert names(fuse(operators, lambda _: "")) == [["silu"], ["mul"]]
    assert names(compiled(operators)) == [["silu", "mul"]]


def test_a_kernel_does_not_wait_for_itself() -> None:
    """The sum needs a product that needs the activation: one kernel for both could not start."""

    def graph(x: Tensor, w: Tensor) -> Tensor:
        hidden = F.silu(x)
        return hidden @ w + hidden

    assert names(compiled(record(graph, (8, 8), (8, 8)))) == [["silu"], ["mm"], ["add"]]


def test_sums_over_frames_are_kernels_of_their_own_with_a_cast() -> None:
    def graph(x: Tensor) -> tuple[Tensor, Tensor]:
        doubled = x * 2
        return doubled.sum(0).float(), doubled.sum(1)

    kernels = compiled(record(graph, (6, 8)))
    assert names(kernels) == [["mul", "sum"], ["sum", "_to_copy"]]
    assert [kernel.launches for kernel in kernels] == [1, 2]
    assert kernels[1].size == 2 * 48  # nothing reads the result


def test_an_index_into_normalised_frames_is_another_kernel() -> None:
    def norm_first(x: Tensor, index: Tensor) -> Tensor:
        return F.layer_norm(x, (8,)).index_select(0, index) * 2

    def norm_last(x: Tensor, index: Tensor) -> Tensor:
        return F.layer_norm((x * 2).index_select(0, index), (8,))

    for graph, expected in (
        (norm_first, [["native_layer_norm"], ["index_select", "mul"]]),
        (norm_last, [["mul", "index_select", "native_layer_norm"]]),
    ):
        trace = KernelTrace()
        with fake_gpu():
            x = torch.empty(6, 8, device="cuda")
            index = torch.empty(6, dtype=torch.int64, device="cuda")
            with trace.phase("forward"):
                graph(x, index)
        assert names(compiled(trace.operators)) == expected


def test_operators_without_inputs_of_the_region_run_where_they_are_read() -> None:
    """The cast of the mask is no kernel, although it could run before the product."""

    def graph(x: Tensor, w: Tensor, mask: Tensor) -> Tensor:
        mask = mask.float()
        return (x @ w).float() * mask

    assert sorted(names(compiled(record(graph, (6, 8), (8, 8), (6, 1))))) == [["_to_copy", "_to_copy", "mul"], ["mm"]]


def test_the_gradient_of_a_norm_is_a_kernel_along_frames_and_one_over_frames() -> None:
    trace = KernelTrace()
    with fake_gpu():
        x, weight, bias, grad = (torch.empty(n, device="cuda") for n in ((6, 8), (8,), (8,), (6, 8)))
        x, weight, bias = (tensor.requires_grad_() for tensor in (x, weight, bias))
        y = F.layer_norm(x, (8,), weight, bias)
        with trace.phase("backward"):
            torch.autograd.grad(y, (x, weight, bias), grad)
    of_input, of_weights = fuse(trace.operators, lambda _: "")
    statistics = 2 * 6
    assert of_input.size == 4 * (48 + 48 + statistics + 8 + 8 + 48)
    assert of_weights.size == 4 * (48 + 48 + statistics + 8 + 8)
    assert trace.operators[1].over_frames


def test_products_of_convolutions_and_copies_of_depthwise_ones() -> None:
    dense, depthwise = record(
        lambda x, w, y, v: (F.conv2d(x, w, stride=2, padding=1), F.conv1d(y.mT, v, padding=2, groups=8)),
        (2, 4, 6, 6), (5, 4, 3, 3), (2, 10, 8), (8, 1, 5),
    )  # fmt: skip
    assert dense.products == [(1, 2 * 3 * 3, 5, 4 * 9)]
    assert depthwise.products == [(8, 20, 1, 5)] and depthwise.flops == 2 * 8 * 20 * 5
    assert not dense.depthwise and depthwise.depthwise
    assert dense.copied == 0 and depthwise.copied == 2 * 160 and depthwise.launches == 2


def test_gradients_of_a_convolution_are_two_products() -> None:
    trace = KernelTrace()
    with fake_gpu():
        x, w = (torch.empty(n, device="cuda", requires_grad=True) for n in ((2, 4, 6, 6), (5, 4, 3, 3)))
        y = F.conv2d(x, w, padding=1)
        grad = torch.empty_like(y)
        with trace.phase("backward"):
            torch.autograd.grad(y, (x, w), grad)
    (operator,) = trace.operators
    assert operator.flops == 2 * 2 * (2 * 36) * 5 * 36 and operator.launches == 2


def test_attention_counts_the_share_of_pairs() -> None:
    def graph(x: Tensor) -> Tensor:
        return unmasked_attention(x, x, x)

    (operator,) = record(graph, (2, 3, 40, 16), share=0.25)
    assert operator.flops == 0.25 * 4 * 2 * 3 * 40 * 40 * 16


def test_the_optimizer_reads_and_writes_28_bytes_per_parameter() -> None:
    trace = KernelTrace()
    with fake_gpu():
        weights = [torch.nn.Parameter(torch.empty(n, device="cuda")) for n in (400_000, 1000)]
        optimizer = torch.optim.AdamW(weights, fused=True)
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer.step()  # allocates the moments
        with trace.phase("update"):
            optimizer.step()
    update = next(k for k in fuse(trace.operators, lambda _: "") if k.operators[0].name == "_fused_adamw_")
    assert update.size == pytest.approx(28 * 401_000, abs=64)  # and the numbers of the step
    assert update.launches == 1
