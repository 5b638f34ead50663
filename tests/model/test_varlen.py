"""Flash attention over segments: boundaries, outputs and gradients, choice of the kernel.

The kernels of a CPU are those of tests/varlen_on_a_cpu.py. tests/scripts/test_cuda.py tests those of a GPU.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen as torch_varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tests.reference_attention  # noqa: F401 - adds the backend 'reference'
from bestrq.model.attention.backends import choose_backend
from bestrq.model.attention.varlen import attend_varlen, make_boundaries
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.layout import order_segments
from bestrq.model.settings import CheckpointingMode, EncoderSettings
from common.errors import UserError
from common.segments import Segments
from pipelines.cuda_runtime import allow_backward_without_a_gpu
from tests.layouts import row_layout
from tests.model.test_encoder_attention import inputs, layout_of, results
from tests.varlen_on_a_cpu import varlen_on_a_cpu


class Operators(TorchDispatchMode):
    """Calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[object] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels() -> Iterator[None]:
    with varlen_on_a_cpu():
        yield


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("position", ["rotary", "none"])
@pytest.mark.parametrize("mask", ["segment", "window", "window 1", "causal"])
def test_it_equals_the_definition_forward_and_backward(
    mask: str, position: str, num_kv_heads: int, kernels: None
) -> None:
    layout = layout_of("reference", mask, position)
    qkv, _ = inputs(layout, num_kv_heads, False)
    expected = results(layout, qkv, None, "reference")
    for actual, exact in zip(results(layout_of("varlen", mask, position), qkv, None, "varlen"), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


def test_boundaries_are_those_of_segments_and_gaps_in_a_fixed_shape() -> None:
    """Slots out of order, without a gap before the first segment, unused, and a row without segments."""
    start = torch.tensor([[0, 5, 3], [4, 0, 0], [0, 0, 0], [2, 7, 0]])
    length = torch.tensor([[2, 4, 1], [6, 0, 0], [0, 0, 0], [3, 1, 0]])
    boundaries = make_boundaries(order_segments(Segments(start, length, 10)))
    assert boundaries.tolist() == [
        0, 0, 2, 3, 4, 5, 9, 10,  # the first 0 is that of the batch
        14, 20, 20, 20, 20, 20, 20,
        30, 30, 30, 30, 30, 30, 30,
        32, 35, 37, 38, 40, 40, 40,
    ]  # fmt: skip
    assert boundaries.dtype == torch.int32


def test_an_empty_row_and_grouped_frames_are_finite(kernels: None) -> None:
    layout = row_layout(
        [[0, 96], [0, 0]], [[90, 88], [0, 0]], 192, backend="varlen", group_size=2, dim=16, num_heads=2
    ).output.attention
    qkv = torch.randn(2, 24, 6, 16, dtype=torch.float64)
    assert torch.isfinite(attend_varlen(qkv, 2, layout, None, 0.0)).all()


def test_torch_takes_the_arguments_and_flash_attention_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on fake tensors of a GPU on which cuDNN's kernel would be taken without a window."""
    allow_backward_without_a_gpu()
    monkeypatch.setattr(torch_varlen, "_should_use_cudnn", lambda index: True)
    layout = layout_of("varlen", head_dim=64).attention
    assert isinstance(layout.backend_mask, torch.Tensor)
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False), torch.device("cuda"):
        boundaries = torch.empty(layout.backend_mask.shape, dtype=torch.int32)
        on_gpu = replace(layout, backend_mask=boundaries, rotary_phase=None)
        qkv = torch.empty(2, 241, 12, 64, dtype=torch.bfloat16, requires_grad=True)
        out = attend_varlen(qkv, 4, on_gpu, None, 0.0)
        assert out.shape == (2, 241, 4, 64) and out.dtype == torch.bfloat16
        (grad,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
        assert grad.shape == qkv.shape
        q = torch.empty(482, 4, 64, dtype=torch.bfloat16)
        assert not torch_varlen._can_use_cudnn(q, q, q, 241, [241, 241])
        assert torch_varlen._can_use_cudnn(q, q, q, 241, [-1, -1])


@pytest.mark.parametrize(("mode", "calls"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_checkpointing_stores_its_output(mode: CheckpointingMode, calls: int, kernels: None) -> None:
    settings = EncoderSettings(dim=16, num_heads=2, num_layers=1, activation_checkpointing=mode, attention_dropout=0.0)
    encoder = ConformerEncoder(settings)
    layout = encoder.layout(Segments(torch.tensor([[0, 64]]), torch.tensor([[60, 64]]), 128), "varlen")
    with Operators() as operators:
        encoder(torch.randn(1, 128, 80), layout).sum().backward()
    assert operators.count[torch.ops.torch_attn._varlen_attn.default] == calls
    assert operators.count[torch.ops.torch_attn._varlen_attn_backward.default] == 1


def test_it_is_chosen_on_cuda_under_autocast_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("varlen", cuda, 500, (9, 9)) == "bands"
    assert choose_backend("varlen", cuda, 500, (None, None)) == "dense"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # needs a GPU otherwise
    assert choose_backend("varlen", cuda, 500, (9, 9)) == "varlen"
    assert choose_backend("varlen", cpu, 500, (9, 9)) == "segments"
    with FlopCounterMode(display=False):
        assert choose_backend("varlen", cuda, 500, (9, 9)) == "bands"


@pytest.mark.parametrize(
    ("name", "value"),
    [("attention_dropout", 0.1), ("mask", "chunk"), ("position", "relative"), ("num_heads", 12)],
)
def test_settings_that_it_lacks_are_refused(name: str, value: object) -> None:
    settings = {"dim": 144, "num_heads": 18, "backend": "varlen", "attention_dropout": 0.0}
    EncoderSettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"encoder\.{name}: {value!r} is invalid: .*give"):
        EncoderSettings(**{**settings, name: value})  # type: ignore[arg-type]
