"""Times of kernels by hand, and the estimate of a small encoder."""

from dataclasses import replace

import pytest
import torch

from benchmarks import roofline
from benchmarks.fake_step import filled_rows
from benchmarks.kernel_trace import Kernel, Operator, fuse
from benchmarks.roofline import H100, Trace, kernel_seconds, product_seconds, trace_step
from bestrq.model.settings import EncoderSettings
from bestrq.pretraining.cost import attention_flops
from bestrq.pretraining.quantizer import QuantizerSettings

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: see cuda_runtime.py")

SMALL = EncoderSettings(
    num_mels=8, dim=64, num_layers=2, num_heads=2, feedforward_dim=96, kernel_size=5, subsampling_channels=8
)
ROUND = replace(H100, peak=1e12, vector_peak=1e10, bandwidth=1e9, processors=4, products=0.5, memory=0.5, gap=1e-3)


def small_step(**options: bool) -> Trace:
    quantizer = QuantizerSettings(num_codebooks=1, codebook_size=32)
    return trace_step(SMALL, rows=2, frames=800, num_segments=2, quantizer=quantizer, **options)


@pytest.fixture(scope="module")
def plain() -> Trace:
    return small_step()


def test_products_take_whole_waves_of_tiles() -> None:
    one_tile = 2 * 128 * 128 * 64 / 1e12
    for rows, columns, waves in ((512, 128, 1), (128, 512, 1), (513, 128, 2), (1024, 128, 2), (100, 3, 1)):
        assert product_seconds((1, rows, columns, 64), 1e12, ROUND) == pytest.approx(4 * waves * one_tile)
    assert product_seconds((4, 128, 128, 64), 1e12, ROUND) == pytest.approx(4 * one_tile)
    for edge in ((5, 100, 128, 64), (5, 128, 100, 64)):  # five tiles, whose elements would fill four
        assert product_seconds(edge, 1e12, ROUND) == pytest.approx(2 * 4 * one_tile)


def test_long_sums_are_split_to_fill_a_wave() -> None:
    """Two tiles on four processors: half of them are idle unless the sums are split into two parts."""
    full = 2 * 256 * 128 * 4096 / 1e12
    assert product_seconds((1, 256, 128, 4096), 1e12, ROUND) == pytest.approx(full)
    assert product_seconds((1, 256, 128, 1024), 1e12, ROUND) == pytest.approx(2 * full / 4)


def test_a_kernel_takes_the_longer_of_arithmetic_and_memory_and_its_gaps() -> None:
    product = Operator("mm", "products", "", "", [], [], dtype=torch.bfloat16, products=[(1, 512, 128, 1024)])
    product.flops = 2 * 512 * 128 * 1024
    seconds = product.flops / (1e12 * 0.5)
    assert kernel_seconds(Kernel("products", [product], 1000, 1), ROUND) == pytest.approx(seconds + 1e-3)
    assert kernel_seconds(Kernel("products", [product], 10**6, 3), ROUND) == pytest.approx(2e-3 + 3e-3)
    in_float32 = replace(product, dtype=torch.float32)
    assert roofline.compute_seconds(in_float32, ROUND) == pytest.approx(product.flops / (1e10 * H100.vector))
    depthwise = replace(product, kind="convolutions", depthwise=True)
    assert roofline.compute_seconds(depthwise, ROUND) == pytest.approx(product.flops / (1e10 * H100.depthwise))


def test_attention_has_the_rate_of_its_kernel() -> None:
    for name, share in (
        ("_scaled_dot_product_flash_attention", H100.attention),
        ("_scaled_dot_product_flash_attention_backward", H100.attention_backward),
        ("_scaled_dot_product_efficient_attention", H100.masked_attention),
        ("_scaled_dot_product_efficient_attention_backward", H100.masked_attention_backward),
    ):
        operator = Operator(name, "attention", "", "", [], [], flops=1e12)
        assert roofline.compute_seconds(operator, H100) == pytest.approx(1e12 / (H100.peak * share))


def test_the_flops_of_the_mfu_are_three_times_those_of_the_forward_pass(plain: Trace) -> None:
    """And attention counts the pairs of frames of a segment, fewer than the kernel with a mask computes."""
    forward = [operator for operator in plain.operators if operator.phase == "forward"]
    computed = sum(operator.flops for operator in forward if operator.kind == "attention")
    allowed = attention_flops(SMALL, filled_rows(2, 800, 2, SMALL))
    assert computed == 4 * 2 * 2 * 200**2 * 64
    assert allowed == 4 * 2 * 2 * (2 * 99**2) * 64
    products = sum(operator.flops for operator in forward if operator.kind != "attention")
    assert plain.model_flops == 3 * (products + allowed)
    backward = [operator for operator in plain.operators if operator.phase == "backward"]
    # The first layer has no gradient of its input.
    first = 2 * 2 * 400 * 4 * 10 * 8
    of_products = sum(operator.flops for operator in backward if operator.kind != "attention")
    assert of_products == 2 * products - first


def test_every_operator_of_a_block_belongs_to_it(plain: Trace) -> None:
    for phase in ("forward", "backward"):
        attention = [o.block for o in plain.operators if o.kind == "attention" and o.phase == phase]
        assert sorted(attention) == [f"block 0 {phase}", f"block 1 {phase}"]
    assert {o.block for o in plain.operators if o.name == "native_layer_norm"} == {"block 0 forward", "block 1 forward"}
    assert {o.block for o in plain.operators if o.phase in ("prepare", "update") or "nll" in o.name} == {""}
    linear = [o for o in plain.operators if o.block == "block 0 backward" and o.kind == "products"]
    assert len(linear) == 2 * 8


def test_kernels_have_all_flops_and_fewer_bytes_when_fused(plain: Trace) -> None:
    eager, compiled, everything = (
        fuse(plain.operators, region) for region in (roofline.uncompiled, roofline.blocks, roofline.everything)
    )
    for kernels in (eager, compiled, everything):
        assert sum(len(kernel.operators) for kernel in kernels) == len(plain.operators)
        assert sum(kernel.flops for kernel in kernels) == sum(operator.flops for operator in plain.operators)
    assert sum(k.size for k in eager) > 1.3 * sum(k.size for k in compiled) > sum(k.size for k in everything)


def test_varlen_attention_and_the_bfloat16_residual_move_fewer_bytes(plain: Trace) -> None:
    varlen, both = small_step(varlen=True), small_step(varlen=True, bfloat16_residual=True)
    share = (2 * 99**2) / 200**2
    flops = [sum(o.flops for o in t.operators if o.kind == "attention") for t in (plain, varlen)]
    assert flops[1] == pytest.approx(flops[0] * share)
    assert varlen.model_flops == both.model_flops == plain.model_flops
    for trace, dtype in ((varlen, torch.float32), (both, torch.bfloat16)):
        norms = [o for o in trace.operators if o.name == "native_layer_norm" and o.block == "block 1 forward"]
        assert {o.dtype for o in norms[:1]} == {dtype}
    sizes = [sum(kernel.size for kernel in fuse(t.operators, roofline.blocks)) for t in (plain, varlen, both)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_changes_of_the_design_remove_what_they_say(plain: Trace) -> None:
    depthwise = [o for o in roofline.with_depthwise_kernel(plain.operators) if o.depthwise]
    assert {(o.flops, o.copied) for o in depthwise} == {(0.0, 0)}
    casts = [new for old, new in zip(plain.operators, roofline.without_weight_casts(plain.operators), strict=True)
             if old is not new and new.name == "_to_copy"]  # fmt: skip
    matrices = 2 * (2 * 2 + 1 + 1 + 2 + 1)  # in two blocks: feed-forward, qkv, out, pointwise, depthwise
    assert sum(len(o.writes[0].place[1]) > 1 for o in casts) == matrices + 3  # subsampling (2), head
    assert {o.launches for o in casts} == {0}


def test_the_table_lists_every_state_and_the_figures_its_mfu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(roofline.PRESETS, "base-120m", SMALL)
    monkeypatch.setattr(roofline, "FRAMES", 800)
    figures = roofline.measure_roofline()
    out = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if "|" in line]
    rows = {name: cells for name, *cells in lines}
    names = ["eager", "compiled", "varlen", "bfloat16_residual"]
    mfu = [figures["estimated_mfu_base_120m" + ("" if name == "compiled" else f"_{name}")] for name in names]
    assert mfu == [float(cell) for cell in rows["MFU"][:4]] and mfu == sorted(mfu) and mfu[0] > 0
