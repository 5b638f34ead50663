"""Every attention backend equals the definition: outputs and gradients, for every mask and position."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tests.reference_attention  # noqa: F401 - adds the backend 'reference'
from bestrq.model.attention.heads import split_heads
from bestrq.model.attention.masks import AttentionLayout
from bestrq.model.attention.module import ATTEND, group_frames, ungroup_frames
from bestrq.model.cpu import attention as segments
from bestrq.model.layout import StageLayout
from tests.layouts import row_layout, stage_layout

HEADS = 4
MASKS: dict[str, dict[str, object]] = {
    "segment": {"mask": "segment"},
    "window": {"mask": "window", "window": 9},
    "window 1": {"mask": "window", "window": 1},
    "causal": {"mask": "causal"},
    "chunk": {"mask": "chunk", "chunk_size": 8, "left_chunks": 2},
    "chunk, all to the left": {"mask": "chunk", "chunk_size": 8, "left_chunks": -1},
}
BOUNDED = ("window", "window 1", "chunk")
LENGTHS = [70, 1, 129, 37]


def layout_of(backend: str, mask: str = "segment", position: str = "rotary", head_dim: int = 6) -> StageLayout:
    """Layout of two rows with odd lengths, a segment of one frame, and padding after the last segment."""
    sizes = {"dim": HEADS * head_dim, "num_heads": HEADS}
    return stage_layout(LENGTHS, rows=2, backend=backend, position=position, **sizes, **MASKS[mask])


def inputs(layout: StageLayout, num_kv_heads: int, biased: bool, head_dim: int = 6) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    heads = HEADS + 2 * num_kv_heads
    qkv = torch.randn(*layout.valid.shape, heads, head_dim, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(HEADS, 2 * 11 + 1, dtype=torch.float64, requires_grad=True) if biased else None
    return qkv, bias


def results(layout: StageLayout, qkv: Tensor, bias: Tensor | None, backend: str) -> list[Tensor]:
    """Outputs of valid frames, and gradients of their sum with fixed weights."""
    out = ATTEND[backend](qkv, HEADS, layout.attention, bias, 0.0)
    assert torch.isfinite(out).all()
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).bfloat16()
    loss = (out * weight.to(out.dtype) * layout.valid[..., None, None]).sum()
    tensors = [qkv] if bias is None else [qkv, bias]
    return [out[layout.valid], *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("position", ["rotary", "relative", "none"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_backend_equals_the_definition_forward_and_backward(mask: str, position: str, num_kv_heads: int) -> None:
    layout = layout_of("reference", mask, position)
    qkv, bias = inputs(layout, num_kv_heads, position == "relative")
    expected = results(layout, qkv, bias, "reference")
    for backend in ("segments", "dense", *(["bands"] if mask in BOUNDED else [])):
        for actual, exact in zip(
            results(layout_of(backend, mask, position), qkv, bias, backend), expected, strict=True
        ):
            torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", MASKS)
def test_dividing_queries_into_blocks_does_not_change_the_results(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of("segments", mask, "relative")
    qkv, bias = inputs(layout, 2, True)
    whole = results(layout, qkv, bias, "segments")
    monkeypatch.setattr(segments, "MAX_WEIGHTS", 300)
    monkeypatch.setattr(segments, "MIN_BLOCK", 5)
    for actual, exact in zip(results(layout, qkv, bias, "segments"), whole, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_weights", [1 << 23, 20], ids=["one block", "blocks of queries"])
@pytest.mark.parametrize("mask", ["segment", "window 1"])
def test_gradients_with_dropout_match_the_outputs(mask: str, max_weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_WEIGHTS", max_weights)
    layout = stage_layout([5, 3], dim=8, num_heads=2, **MASKS[mask]).attention
    torch.manual_seed(0)
    qkv = torch.randn(1, 10, 4, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same dropout masks in every call
        return segments.attend_in_segments(qkv, 2, layout, bias, 0.4)

    assert torch.autograd.gradcheck(attend, (qkv, bias))


class LargestTensor(TorchDispatchMode):
    """Largest number of elements in a tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        self.numel = max(self.numel, *(t.numel() for t in tensors if t is not None))
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_of_a_long_segment_is_linear_in_its_length(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_WEIGHTS", 1 << 17)
    length, heads, head_dim = 3000, 2, 4
    qkv = torch.randn(1, length + 1, 3 * heads, head_dim, requires_grad=True)
    layout = stage_layout([length], dtype=torch.float32).attention
    saved: list[int] = []
    count = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with LargestTensor() as largest, count:
        segments.attend_in_segments(qkv, heads, layout, None, dropout).sum().backward()
    assert largest.numel <= 1 << 17 < heads * length**2 / 100
    assert sum(saved) <= 2 * qkv.numel()


@pytest.mark.parametrize("backend", ["segments", "bands"])
def test_windowed_attention_computes_a_number_of_products_linear_in_the_length(backend: str) -> None:
    products = {}
    for length in (1000, 4000):
        layout = stage_layout([length], dtype=torch.float32, backend=backend, mask="window", window=32)
        qkv = torch.randn(1, length + 1, 6, 4)
        with LargestTensor() as largest, FlopCounterMode(display=False) as counter:
            ATTEND[backend](qkv, 2, layout.attention, None, 0.0)
        products[length] = counter.get_total_flops()
        assert largest.numel <= 2 * length * 3 * 64
    assert products[4000] <= 4.3 * products[1000]


def test_dropped_share_and_mean_of_attention_weights() -> None:
    length = 400
    qkv = torch.zeros(1, length + 1, 3, 4)
    qkv[:, :, 2] = 1.0  # equal weights on values of one: every output is the sum of the kept weights
    torch.manual_seed(0)
    layout = stage_layout([length], dtype=torch.float32, dim=4, num_heads=1).attention
    out = segments.attend_in_segments(qkv, 1, layout, None, 0.1)[:, :length]
    share = 26 / 256
    deviation = (share / (1 - share) / length) ** 0.5
    assert abs(float(out.mean()) - 1) < 4 * deviation / (length**0.5)
    assert float(out.std(unbiased=False) / deviation) == pytest.approx(1, abs=0.1)


def attend_eagerly(qkv: Tensor, num_heads: int, layout: AttentionLayout, bias: Tensor | None, dropout: float) -> Tensor:
    """Low-precision reference: product, softmax, product, each rounded to the precision of its inputs."""
    assert isinstance(layout.backend_mask, Tensor)
    q, k, v = split_heads(qkv, num_heads, layout.rotary_phase)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        frame, reach = torch.arange(q.shape[2]), bias.shape[1] // 2
        scores = scores + bias[:, (frame - frame[:, None]).clamp(-reach, reach) + reach].to(scores.dtype)
    return (scores.masked_fill(~layout.backend_mask, -torch.inf).softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("biased", [False, True], ids=["rotary", "relative"])
def test_bfloat16_error_is_at_most_that_of_plain_products_and_softmax_in_bfloat16(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budget: 1.5 times the error of the plain definition at the same precision, against float64."""
    monkeypatch.setitem(ATTEND, "dense", attend_eagerly)
    position, head_dim = "relative" if biased else "rotary", 36
    settings = {"dim": HEADS * head_dim, "num_heads": HEADS, "position": position}
    exact_layout = stage_layout(LENGTHS, backend="reference", **settings)
    low_layouts = {b: stage_layout(LENGTHS, backend=b, dtype=torch.float32, **settings) for b in ("segments", "dense")}
    qkv, bias = inputs(exact_layout, HEADS, biased, head_dim)
    qkv = (2 * qkv.detach()).bfloat16().double().requires_grad_()
    exact = results(exact_layout, qkv, bias, "reference")
    low = (qkv.detach().bfloat16().requires_grad_(), None if bias is None else bias.detach().float().requires_grad_())
    segmented, plain = (results(low_layouts[b], *low, b) for b in ("segments", "dense"))
    for truth, actual, reference in zip(exact, segmented, plain, strict=True):
        error = (actual.double() - truth).norm()
        assert error <= 1.5 * (reference.double() - truth).norm() and error <= 0.03 * truth.norm()


def test_frames_are_concatenated_in_groups_and_split_again() -> None:
    x = torch.arange(2 * 6 * 2 * 3).view(2, 6, 2, 3)
    grouped = group_frames(x, 3)
    assert grouped.shape == (2, 2, 2, 9) and torch.equal(ungroup_frames(grouped, 3), x)
    assert torch.equal(grouped[0, 1, 0], x[0, 3:6, 0].flatten())


def test_padding_frames_attend_to_themselves_only() -> None:
    layout: AttentionLayout = stage_layout([5, 3], gap=2).attention
    first, stop = layout.first_key[0].tolist(), layout.stop_key[0].tolist()
    assert first == [0] * 5 + [5, 6] + [7] * 3 + [10, 11]
    assert stop == [5] * 5 + [6, 7] + [10] * 3 + [11, 12]


@pytest.mark.parametrize("position", ["rotary", "relative"])
def test_rows_of_one_segment_mask_padding_only(position: str) -> None:
    """A mask per query would be quadratic in the length of a recording. An empty row stays finite."""
    shape = {"dim": HEADS * 6, "num_heads": HEADS, "position": position}
    layouts = {
        b: row_layout([[0], [8], [0]], [[100], [61], [0]], 120, backend=b, **shape) for b in ("dense", "reference")
    }
    mask = layouts["dense"].output.attention.backend_mask
    assert isinstance(mask, Tensor) and mask.shape == (3, 1, 1, 30) and mask[2].all()
    qkv, bias = inputs(layouts["dense"].output, 2, position == "relative")
    dense, exact = (results(layout.output, qkv, bias, name) for name, layout in layouts.items())
    for actual, truth in zip(dense, exact, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-10)
