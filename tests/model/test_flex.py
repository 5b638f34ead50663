"""FlexAttention: block masks, outputs and gradients, number of compilations.

torch checks the device and refuses gradients of FlexAttention on a CPU. Without the check, and uncompiled, its graphs
of scores and gradients run on a CPU in float64. tests/scripts/test_cuda.py tests the kernels.
"""

import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import tests.reference_attention  # noqa: F401 - adds the backend 'reference'
from bestrq.model.attention import flex
from bestrq.model.attention.backends import choose_backend
from bestrq.model.attention.draw_mask import dense_mask
from bestrq.model.attention.flex import BLOCK, attend_flex, compiled_flex_attention, make_block_mask
from bestrq.model.attention.module import ATTEND
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import StageSettings
from common.segments import Segments
from tests.layouts import row_layout, stage_layout
from tests.model.test_encoder_attention import HEADS, MASKS, LargestTensor, inputs, layout_of, results

WIDE = {
    "window 300": {"mask": "window", "window": 300},
    "chunk 100": {"mask": "chunk", "chunk_size": 100, "left_chunks": 3},
}
"""masks with full blocks, in addition to MASKS"""
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def counting(calls: list[str]) -> Callable[..., Any]:
    """Backend for torch.compile that runs graphs unchanged and records compilations and runs."""

    def named(name: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
            calls.append(f"compile {name}")

            def run(*args: Any) -> Any:
                calls.append(name)
                return graph(*args)

            return make_boxed_func(run)

        return compiler

    return aot_autograd(fw_compiler=named("forward"), bw_compiler=named("backward"))


def to_dense(count: Tensor | None, index: Tensor | None) -> Tensor:
    """Blocks that a BlockMask lists, bool `[R, blocks, blocks]`."""
    assert count is not None and index is not None
    used = torch.arange(index.shape[-1]) < count[..., None]
    return torch.zeros_like(used).scatter(-1, index.long(), used)[:, 0]


@pytest.mark.parametrize("frames", [384, 400, 511], ids="{} frames".format)
@pytest.mark.parametrize("mask", MASKS | WIDE)
def test_block_mask_equals_that_of_all_pairs_of_frames(mask: str, frames: int) -> None:
    """In both directions: the backward pass uses the blocks of queries that attend to a block of keys."""
    segments = [
        [(0, 128), (129, 1), (131, 253)],
        [],
        [(0, 384)],
        [(1, 300), (302, 54)],
    ]  # two end at the edge of a block
    starts, lengths = ([[4 * s[i] for s in row] + [0] * (3 - len(row)) for row in segments] for i in (0, 1))
    layout = row_layout(starts, lengths, 4 * frames, backend="flex", **(MASKS | WIDE)[mask]).output.attention
    blocks = -(-frames // BLOCK)
    truth = torch.eye(blocks * BLOCK, dtype=torch.bool).repeat(len(segments), 1, 1)
    for row, spans in enumerate(segments):
        for start, length in spans:
            truth[row, start : start + length, start : start + length] = dense_mask(layout.mask, length)
    block_mask = layout.backend_mask
    assert isinstance(block_mask, BlockMask)
    frame = torch.arange(blocks * BLOCK)
    row = torch.arange(len(segments))[:, None, None]
    assert torch.equal(block_mask.mask_mod(row, row * 0, frame[:, None], frame), truth)
    tiles = truth.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3).flatten(3)
    full, partial_blocks = tiles.all(dim=3), tiles.any(dim=3) & ~tiles.all(dim=3)
    torchs = create_block_mask(block_mask.mask_mod, len(segments), None, blocks * BLOCK, blocks * BLOCK, device="cpu")
    for made in (block_mask, torchs):
        assert torch.equal(to_dense(made.kv_num_blocks, made.kv_indices), partial_blocks)
        assert torch.equal(to_dense(made.full_kv_num_blocks, made.full_kv_indices), full)
        assert torch.equal(to_dense(made.q_num_blocks, made.q_indices), partial_blocks.mT)
        assert torch.equal(to_dense(made.full_q_num_blocks, made.full_q_indices), full.mT)
    assert block_mask.shape == torchs.shape and block_mask.BLOCK_SIZE == torchs.BLOCK_SIZE
    assert mask not in ("segment", *WIDE) or bool(full.any())


def test_memory_of_a_block_mask_of_half_an_hour_is_linear_in_frames_and_pairs_of_blocks() -> None:
    frames = 45_000
    blocks = -(-frames // BLOCK)
    first = (torch.arange(frames) - 1000).clamp(min=0)[None]
    with LargestTensor() as largest:
        make_block_mask(first, (first + 2000).clamp(max=frames))
    assert frames < largest.numel <= blocks * (blocks + 1) < frames**2 / 10_000


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("position", ["rotary", "relative", "none"])
@pytest.mark.parametrize("mask", MASKS)
def test_flex_equals_the_definition_forward_and_backward(
    mask: str, position: str, num_kv_heads: int, gradients_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including the gradient of the bias, summed over pairs by the graph from which the kernels are generated."""
    monkeypatch.setitem(ATTEND, "flex", partial(attend_flex, attention=torch_flex.flex_attention))
    qkv, bias = inputs(layout_of("reference"), num_kv_heads, position == "relative")
    expected = results(layout_of("reference", mask, position), qkv, bias, "reference")
    for actual, exact in zip(results(layout_of("flex", mask, position), qkv, bias, "flex"), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile")
@pytest.mark.skipif(
    bool(torch.cpu.get_capabilities().get("avx512_f")) and torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="torch.compile emits AVX-512 although ATEN_CPU_CAPABILITY limits ATen to AVX2, and mixes the two wrongly",
)
@pytest.mark.parametrize("training", [True, False], ids=["fixed shapes", "any shapes"])
def test_compiled_flex_equals_the_definition_forward_on_a_cpu(training: bool) -> None:
    position, num_kv_heads = ("relative", 2) if training else ("rotary", 4)
    settings: dict[str, Any] = {"dim": 24, "num_heads": HEADS, "position": position, "mask": "window", "window": 9}
    torch.manual_seed(0)
    bias = torch.randn(HEADS, 23) if training else None
    for lengths in ([130, 1, 37],) if training else ([130, 1, 37], [500, 70]):
        low, exact = (
            stage_layout(lengths, rows=2, dtype=dtype, backend=backend, **settings)
            for dtype, backend in ((torch.float32, "flex"), (torch.float64, "reference"))
        )
        qkv = torch.randn(*low.valid.shape, HEADS + 2 * num_kv_heads, 6)
        with torch.no_grad():
            actual = attend_flex(qkv, HEADS, low.attention, bias, 0.0, compiled_flex_attention(training))
        truth = ATTEND["reference"](qkv.double(), HEADS, exact.attention, bias, 0.0)
        torch.testing.assert_close(actual[low.valid].double(), truth[low.valid], rtol=1e-5, atol=1e-5)
        assert torch.isfinite(actual).all()


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_fifty_batches_of_one_shape_compile_once_and_are_freed(position: str, gradients_on_a_cpu: None) -> None:
    """With two layers and biases, alternating training and evaluation."""
    calls: list[str] = []
    compiled = {training: compiled_flex_attention(training, counting(calls)) for training in (True, False)}
    masks = []
    for batch in range(50):
        cut = 1 + batch * 3
        layout = stage_layout([200 - cut, cut, 37], rows=2, dim=24, num_heads=4, position=position, backend="flex",
                              dtype=torch.float32).attention  # fmt: skip
        masks.append(weakref.ref(layout.first_key))
        for _ in range(2):
            bias = torch.randn(4, 23, requires_grad=True) if position == "relative" else None
            qkv = torch.randn(2, layout.first_key.shape[1], 8, 6, requires_grad=True)
            attend_flex(qkv, 4, layout, bias, 0.0, compiled[True]).sum().backward()
            with torch.no_grad():
                attend_flex(qkv, 4, layout, bias, 0.0, compiled[False])
    assert sorted({call: calls.count(call) for call in calls}.items()) == [
        ("backward", 100), ("compile backward", 1), ("compile forward", 2), ("forward", 200)
    ]  # fmt: skip
    del layout
    assert not any(mask() is not None for mask in masks)


def test_recordings_of_any_length_and_number_compile_for_few_shapes() -> None:
    """For rows of one block or more, and one row or more: torch specialises sizes of 1."""
    calls: list[str] = []
    compiled = compiled_flex_attention(False, counting(calls))
    for rows in (1, 2, 3):
        for length in (20, 130, 300, 700, 900):
            layout = stage_layout([length], rows=rows, backend="flex", dtype=torch.float32).attention
            with torch.no_grad():
                attend_flex(torch.randn(rows, length + 1, 6, 4), 2, layout, None, 0.0, compiled)
    assert calls.count("compile forward") <= 4 and calls.count("forward") == 15


def test_too_many_kernels_are_an_error_not_a_fallback_that_stores_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "MAX_KERNELS", 2)
    compiled = compiled_flex_attention(True, counting([]))
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for length in (20, 130, 300):
            layout = stage_layout([length], backend="flex", dtype=torch.float32).attention
            attend_flex(torch.randn(1, length + 1, 6, 4), 2, layout, None, 0.0, compiled)


SMALL: dict[str, Any] = {
    "num_mels": 8, "dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "kernel_size": 7,
    "subsampling_channels": 4, "dropout": 0.0, "attention_dropout": 0.0, "backend": "flex",
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "rotary, window": {"mask": "window", "window": 30},
    "relative, shared heads": {"position": "relative", "num_kv_heads": 1},
    "fourier, causal": {"position": "fourier", "mask": "causal", "causal_convolution": True},
    "stages, groups": {"earlier_stages": [StageSettings(1, 8, 2, 12, group_size=3)], "position": "relative"},
}


def make_encoder(**changes: Any) -> ConformerEncoder:
    torch.manual_seed(0)
    encoder = ConformerEncoder(EncoderSettings(**{**SMALL, **changes}))
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def encode(encoder: nn.Module, layout_of: ConformerEncoder, backend: str) -> Tensor:
    starts, lengths = torch.tensor([[0, 360], [0, 0]]), torch.tensor([[330, 400], [0, 770]])
    dtype = next(encoder.parameters()).dtype
    log_mel = torch.randn(2, 792, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    return encoder(log_mel, layout_of.layout(Segments(starts, lengths, 792), backend))


@pytest.mark.parametrize("variant", ENCODERS)
def test_encoder_with_flex_equals_the_encoder_with_the_definition(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda training: torch_flex.flex_attention)
    encoder = make_encoder(**ENCODERS[variant]).double().eval()
    with torch.no_grad():
        actual, exact = (encode(encoder, encoder, backend) for backend in ("flex", "reference"))
    torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("wrapped", ["none", "selective", "full", "ddp", "fsdp"])
def test_gradients_through_compiled_flex_hold_under_checkpointing_ddp_and_fsdp(
    wrapped: str, gradients_on_a_cpu: None, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    compiled = compiled_flex_attention(True, counting(calls))
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda training: compiled)
    mode = wrapped if wrapped in ("selective", "full") else "none"
    exact = make_encoder(position="relative").double()
    encode(exact, exact, "reference")[..., 0].sin().sum().backward()
    encoder = make_encoder(position="relative", activation_checkpointing=mode).double()
    module: nn.Module = encoder
    if wrapped == "ddp":
        module = DistributedDataParallel(encoder)
    elif wrapped == "fsdp":
        for block in [*encoder.blocks, encoder]:
            fully_shard(block, mesh=dist.init_device_mesh("cpu", (1,)))
    encode(module, encoder, "flex")[..., 0].sin().sum().backward()
    for parameter, exact_parameter in zip(encoder.parameters(), exact.parameters(), strict=True):
        grad, truth = parameter.grad, exact_parameter.grad
        assert grad is not None and truth is not None
        whole = grad.full_tensor() if isinstance(grad, dist.tensor.DTensor) else grad
        torch.testing.assert_close(whole, truth, rtol=1e-8, atol=1e-10)
    assert calls.count("forward") == (2 if mode == "none" else 4)
    assert calls.count("compile forward") == calls.count("compile backward") == 1


def test_backend_is_chosen_by_device_setting_and_reach() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for setting in ("sdpa", "flex"):
        assert choose_backend(setting, cpu, 500, (9, 9)) == "segments"
    assert choose_backend("flex", cuda, 500, (None, None)) == choose_backend("flex", cuda, 500, (9, 9)) == "flex"
    assert choose_backend("sdpa", cuda, 500, (9, 9)) == "bands"
    for reach in ((None, None), (None, 0), (124, 126)):
        assert choose_backend("sdpa", cuda, 500, reach) == "dense"
    with FlopCounterMode(display=False):
        assert choose_backend("flex", cuda, 500, (9, 9)) == "bands"


def test_flex_refuses_attention_dropout() -> None:
    layout = layout_of("flex").attention
    with pytest.raises(AssertionError):
        attend_flex(torch.zeros(1), 1, layout, None, 0.1)
    with pytest.raises(ValueError, match="attention_dropout"):
        replace(EncoderSettings(), backend="flex")
