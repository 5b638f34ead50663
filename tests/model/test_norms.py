"""Norms: parameter names and values equal torch's; batch norm over the valid frames of all ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bestrq.model import norms
from bestrq.model.batch_norm import MaskedBatchNorm
from bestrq.model.norms import LayerNorm, RMSNorm, make_norm
from bestrq.training.process import World
from tests.gloo import run_distributed

DIM = 5


def test_layer_norm_has_the_parameter_names_and_numbers_of_torchs() -> None:
    norm, torchs = make_norm("layer_norm", 8), nn.LayerNorm(8)
    assert isinstance(norm, LayerNorm) and list(norm.state_dict()) == ["weight", "bias"]
    norm.load_state_dict(torchs.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(norm(x), torchs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rms_norm_has_a_weight_only_and_divides_by_the_root_mean_square(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = make_norm("rms_norm", 8)
    assert isinstance(norm, RMSNorm) and list(norm.state_dict()) == ["weight"]
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = torch.randn(3, 8).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(norm(x).double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_norms_of_zeros_are_finite(kind: str) -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    make_norm(kind, 8)(x).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_an_unknown_norm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="group_norm.*'layer_norm', 'rms_norm' or 'batch_norm'"):
        make_norm("group_norm", 8)


@pytest.mark.cuda
@pytest.mark.skipif(norms.fused_rms_norm_affine is None or not torch.cuda.is_available(), reason="needs a GPU and Apex")
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_apex_equals_torch(kind: str) -> None:
    torch.manual_seed(0)
    norm = make_norm(kind, 64)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    x = torch.randn(7, 64)
    expected = norm(x)
    torch.testing.assert_close(norm.cuda()(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)


# ---- batch norm


def make_batch(lengths: list[int], frames: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Noise [R, T, D] far from zero, and the validity of frames; invalid frames are noise of another scale."""
    generator = torch.Generator().manual_seed(3)
    valid = torch.arange(frames) < torch.tensor(lengths)[:, None]
    x = torch.randn(len(lengths), frames, DIM, dtype=torch.float64, generator=generator) * 2 + 30
    return torch.where(valid[..., None], x, -100 * x).to(dtype), valid


def randomise(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0, generator=generator)
    return norm


def test_batch_norm_equals_torchs_on_the_valid_frames() -> None:
    masked, torchs = randomise(MaskedBatchNorm(DIM).double()), randomise(nn.BatchNorm1d(DIM).double())
    assert list(masked.state_dict()) == list(torchs.state_dict())
    weight = torch.randn(2, 9, DIM, dtype=torch.float64)
    for step, train in enumerate((True, True, False, True)):
        x, valid = make_batch([9 - step, 4 + step])
        x.requires_grad_()
        masked.train(train), torchs.train(train)
        out = masked(x, valid)
        expected = torch.zeros_like(out)
        expected[valid] = torchs(x[valid])
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        actual_grads = torch.autograd.grad((out * weight).sum(), (x, *masked.parameters()))
        expected_grads = torch.autograd.grad((expected * weight).sum(), (x, *torchs.parameters()))
        torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-10, atol=1e-10)
        assert out[~valid].abs().max() == 0 and actual_grads[0][~valid].abs().max() == 0
        for name, value in masked.state_dict().items():
            torch.testing.assert_close(value, torchs.state_dict()[name], rtol=1e-12, atol=1e-12)
    torchs.load_state_dict(masked.state_dict())


def test_batch_norm_of_bfloat16_computes_its_statistics_in_float32() -> None:
    x, valid = make_batch([400, 300], 400, torch.bfloat16)
    norm, exact = MaskedBatchNorm(DIM), MaskedBatchNorm(DIM).double()
    out = norm(x, valid)
    exact(x.double(), valid)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean.double(), exact.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), exact.running_var, rtol=1e-5, atol=1e-5)


def test_float32_variance_is_accurate_with_a_mean_a_thousand_times_larger() -> None:
    x = 4096 + torch.randn(1, 500, DIM, dtype=torch.float64)
    valid = torch.ones(1, 500, dtype=torch.bool)
    norm = MaskedBatchNorm(DIM)
    norm(x.float(), valid)
    expected = 0.9 + 0.1 * x[0].float().double().var(0)
    torch.testing.assert_close(norm.running_var.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("lengths", [[0, 0], [1, 0]], ids=["no valid frame", "one valid frame"])
def test_a_batch_without_variance_is_finite_and_keeps_the_running_statistics(lengths: list[int]) -> None:
    norm = MaskedBatchNorm(DIM)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    x, valid = make_batch(lengths, dtype=torch.float32)
    x.requires_grad_()
    out = norm(x, valid)
    out.square().sum().backward()
    assert x.grad is not None and bool(out.isfinite().all()) and x.grad.abs().max() == 0
    for name, value in norm.named_buffers():
        assert torch.equal(value, before[name])


def normalise_rank(lengths: list[int], loss_weight: Tensor, rank: int, ranks: int) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after two training steps on the rows of this rank."""
    norm = randomise(MaskedBatchNorm(DIM).double())
    for _ in range(2):
        x, valid = make_batch(lengths)
        share = slice(rank * len(x) // ranks, (rank + 1) * len(x) // ranks)
        x = x[share].requires_grad_()
        out = norm(x, valid[share])
        grads = torch.autograd.grad((out * loss_weight[share]).sum(), (x, *norm.parameters()))
    named = dict(zip(("x", "weight", "bias"), grads, strict=True))
    return {"out": out.detach(), **named, **{name: buffer.clone() for name, buffer in norm.named_buffers()}}


def normalise_cases(world: World, cases: list[list[int]], loss_weight: Tensor) -> list[dict[str, Tensor]]:
    return [normalise_rank(lengths, loss_weight, world.rank, world.size) for lengths in cases]


def test_batch_norm_of_two_processes_equals_one_even_if_a_process_has_no_valid_frame() -> None:
    cases = [[9, 4, 7, 1], [9, 4, 0, 0], [0, 0, 5, 2], [0, 0, 0, 0]]
    loss_weight = torch.randn(4, 9, DIM, dtype=torch.float64)
    first, second = run_distributed(normalise_cases, 2, cases, loss_weight)
    for lengths, a, b in zip(cases, first, second, strict=True):
        whole = normalise_rank(lengths, loss_weight, 0, 1)
        for name in ("out", "x"):
            torch.testing.assert_close(torch.cat([a[name], b[name]]), whole[name], rtol=1e-10, atol=1e-10)
        for name in ("weight", "bias"):
            torch.testing.assert_close(a[name] + b[name], whole[name], rtol=1e-10, atol=1e-10)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(a[name], b[name])
            torch.testing.assert_close(a[name], whole[name], rtol=1e-10, atol=1e-10)


def test_batch_norm_gradients_match_its_outputs() -> None:
    norm = randomise(MaskedBatchNorm(DIM).double())
    x, valid = make_batch([4, 3], 4)
    x = torch.where(valid[..., None], x, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.silu(norm(x, valid)), (x,))


def test_a_batch_with_non_finite_values_keeps_the_running_statistics() -> None:
    norm = MaskedBatchNorm(3)
    norm(torch.randn(1, 8, 3), torch.ones(1, 8, dtype=torch.bool))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    for bad in (torch.nan, torch.inf):
        x = torch.randn(1, 8, 3)
        x[0, 2, 1] = bad
        norm(x, torch.ones(1, 8, dtype=torch.bool))
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
