"""Attention by segment on the CPU: right gradients with and without dropout, linear memory, bounded error in bf16."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bestrq.model import attention
from bestrq.model.layout import RowLayout, make_layout
from bestrq.model.positions import rotary_phase, rotate


def layout_of(
    lengths: list[int], head_dim: int, dtype: torch.dtype = torch.float64, position: bool = True
) -> RowLayout:
    """One row of segments of these encoder frames, a frame apart."""
    starts = [sum(lengths[:i]) + i for i in range(len(lengths))]
    return make_layout(
        torch.tensor([starts]) * 4, torch.tensor([lengths]) * 4, 4 * (starts[-1] + lengths[-1]),
        subsampling_factor=4, reach=3, rotary_dim=head_dim if position else None, rotary_theta=1e4,
        device=torch.device("cpu"), dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("max_weights", [1 << 23, 20], ids=["one block", "blocks of queries"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("position", [True, False], ids=["rotary", "none"])
def test_gradients_are_those_of_the_outputs(
    position: bool, dropout: float, max_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_WEIGHTS", max_weights)
    layout = layout_of([5, 3], 4, position=position)
    torch.manual_seed(0)
    qkv = torch.randn(1, 9, 3, 2, 4, dtype=torch.float64, requires_grad=True)

    def attend(qkv: Tensor) -> Tensor:
        torch.manual_seed(7)  # the same masks at every call
        return attention.attend_in_segments(qkv, layout, dropout)

    assert torch.autograd.gradcheck(attend, (qkv,))


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of([37, 12], 8)
    torch.manual_seed(0)
    qkv = torch.randn(1, 50, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for max_weights in (1 << 23, 300):
        monkeypatch.setattr(attention, "MAX_WEIGHTS", max_weights)
        out = attention.attend_in_segments(qkv, layout, 0.0)
        results.append((out, *torch.autograd.grad(out.pow(2).sum(), qkv)))
    for whole, blocks in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple) else (out,)
        self.numel = max(self.numel, *(t.numel() for t in tensors if t is not None))
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_memory_of_a_long_segment_is_linear_in_its_length(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_WEIGHTS", 1 << 17)
    length, heads, head_dim = 3000, 2, 4
    qkv = torch.randn(1, length, 3, heads, head_dim, requires_grad=True)
    layout = layout_of([length], head_dim, torch.float32)
    with LargestTensor() as largest:
        attention.attend_in_segments(qkv, layout, dropout).sum().backward()
    assert largest.numel <= 1 << 17 < heads * length**2 / 100


def test_dropped_share_and_mean_of_attention_weights() -> None:
    length = 400
    qkv = torch.zeros(1, length, 3, 1, 4)
    qkv[:, :, 2] = 1.0  # equal weights on values of one: every output is the sum of the weights that were kept
    torch.manual_seed(0)
    out = attention.attend_in_segments(qkv, layout_of([length], 4, torch.float32), 0.1)
    share = 26 / 256
    deviation = (share / (1 - share) / length) ** 0.5
    assert abs(float(out.mean()) - 1) < 4 * deviation / (length**0.5)
    assert float(out.std(unbiased=False) / deviation) == pytest.approx(1, abs=0.1)


def test_bfloat16_error_is_that_of_torchs_own_product_softmax_product() -> None:
    """Scores are rounded to bfloat16 before a softmax that is reckoned in float32, as eager attention does everywhere.

    Budget: twice the error of torch's math kernel at the same precision, against float64.
    """
    torch.manual_seed(0)
    heads, head_dim, lengths = 4, 36, [200, 61]
    qkv = torch.randn(1, sum(lengths) + 1, 3, heads, head_dim, dtype=torch.float64) * 2
    qkv = qkv.bfloat16().double().requires_grad_()
    weight = torch.randn(1, sum(lengths) + 1, heads, head_dim, dtype=torch.float64).bfloat16().double()
    low = qkv.detach().bfloat16().requires_grad_()
    layout, low_layout = layout_of(lengths, head_dim), layout_of(lengths, head_dim, torch.float32)

    exact = attention.attend_in_segments(qkv, layout, 0.0)
    ours = attention.attend_in_segments(low, low_layout, 0.0)
    owner = torch.tensor([0] * lengths[0] + [-1] + [1] * lengths[1])
    low_layout.attention_mask = (owner[:, None] == owner)[None, None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        reference = attention.attend_with_mask(low, low_layout, 0.0)

    where = layout.valid[..., None, None]
    grads = [
        torch.autograd.grad((o * weight.to(o.dtype) * where).sum(), i)[0].double()
        for o, i in ((exact, qkv), (ours, low), (reference, low))
    ]
    for truth, mine, theirs in ((exact, ours.double(), reference.double()), grads):
        truth, mine, theirs = (t[layout.valid] for t in (truth, mine, theirs))
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm()
        assert (mine - truth).norm() <= 0.03 * truth.norm()


def test_rotated_products_depend_on_the_distance_only_even_an_hour_in() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 64)
    phase = rotary_phase(torch.tensor([0, 17, 89_000, 89_017]), 64, 1.5e6, torch.float32)
    near = (rotate(q, phase[0]) * rotate(k, phase[1])).sum()
    far = (rotate(q, phase[2]) * rotate(k, phase[3])).sum()
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)
    assert abs(float((rotate(q, phase[0]) * rotate(k, phase[0])).sum() - near)) > 1e-3
