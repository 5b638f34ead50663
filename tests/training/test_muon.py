"""Muon: its matrices, the iteration against a singular value decomposition in float64, and torch's own optimizers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bestrq.model.conformer import ConformerEncoder
from bestrq.model.settings import EncoderSettings, StageSettings
from bestrq.training.muon import Muon, orthogonalise
from bestrq.training.optimizer import OptimizerSettings, build_optimizer, set_learning_rates
from common.errors import UserError

SETTINGS = OptimizerSettings(
    name="muon", learning_rate=3e-2, warmup_steps=0, schedule="constant", weight_decay=0.3, muon_rate=2.0
)


class Attention(nn.Module):
    """Queries of width 6, and keys and values with fewer heads, of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 14)
        self.out = nn.Linear(6, 9)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(6, 5)


def gradients(model: nn.Module, steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=generator) for p in model.parameters()] for _ in range(steps)]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[list[Tensor]]) -> None:
    for number, grads in enumerate(steps, start=1):
        if isinstance(optimizer, Muon):
            set_learning_rates(optimizer, number, len(steps))
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


def muon_names(model: nn.Module) -> set[str]:
    optimizer = build_optimizer([(model.named_parameters(), SETTINGS)])
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p] for group in optimizer.param_groups if group["is_muon"] for p in group["params"]}


def test_muon_has_the_linear_layers_of_the_blocks_and_nothing_else() -> None:
    settings = EncoderSettings(dim=16, num_layers=1, num_heads=2, feedforward_dim=24, kernel_size=5,
                               feedforward="swiglu", position="relative", subsampling="striding")  # fmt: skip
    stages = replace(settings, position="rotary", earlier_stages=[StageSettings(1, 8, 2, 12)])
    linear = {
        f"{module}.{layer}" for module in ("feedforward_in", "feedforward_out") for layer in ("hidden", "gate", "out")
    }
    linear |= {"attention.qkv", "attention.out", "convolution.pointwise_in", "convolution.pointwise_out"}
    assert muon_names(ConformerEncoder(settings)) == {f"blocks.0.{name}.weight" for name in linear}
    assert muon_names(nn.ModuleDict({"encoder": ConformerEncoder(stages), "head": nn.Linear(16, 9)})) == {
        f"encoder.blocks.{block}.{name}.weight" for block in (0, 1) for name in linear
    } | {"encoder.blocks.0.shortcut.weight"}


def test_a_model_without_such_a_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="no matrix of an encoder block is trained: give 'adamw'"):
        build_optimizer([(nn.Linear(3, 3).named_parameters(), SETTINGS)])


def polynomial_of_singular_values(matrix: Tensor) -> Tensor:
    """Float64: singular values over their norm, five times a s + b s^3 + c s^5 (Jordan et al. 2024)."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (1, 7)])
def test_the_iteration_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = polynomial_of_singular_values(matrix)
    torch.testing.assert_close(orthogonalise(matrix).double(), expected, rtol=1e-4, atol=1e-5)
    assert not orthogonalise(torch.zeros(shape)).any()


@pytest.mark.parametrize(("shape", "factor"), [((6, 9), 1), ((8, 2), 2)])
def test_in_bfloat16_the_iteration_is_that_of_torch_bit_for_bit(shape: tuple[int, int], factor: int) -> None:
    """Torch's update of [A, B] is sqrt(A / B) times the result if A is larger."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = matrix.clone()
    torch.optim.Muon([weight], 1.0, 0.0, momentum=0.0, nesterov=False).step()
    assert torch.equal(-factor * orthogonalise(matrix.bfloat16()).float(), weight.detach())


def test_updates_follow_the_formulas_in_float64_and_queries_keys_and_values_are_orthogonalised_alone() -> None:
    torch.manual_seed(0)
    model, steps = Model(), gradients(Model(), 4)
    attention = model.blocks[0].attention
    rows = {"qkv": (6, 4, 4), "out": (9,)}
    expected = {name: getattr(attention, name).weight.detach().double() for name in rows}
    train(model, build_optimizer([(model.named_parameters(), SETTINGS)]), steps)
    order = [name for name, _ in model.named_parameters()]
    for name, parts in rows.items():
        weight, momentum = expected[name], torch.zeros_like(expected[name])
        for grads in steps:
            grad = grads[order.index(f"blocks.0.attention.{name}.weight")].double()
            momentum = 0.95 * momentum + 0.05 * grad
            update = 0.05 * grad + 0.95 * momentum
            directions = [
                polynomial_of_singular_values(part) * 0.2 * max(part.shape) ** 0.5 for part in update.split(parts)
            ]
            weight = weight * (1 - 6e-2 * 0.3) - 6e-2 * torch.cat(directions)
        torch.testing.assert_close(getattr(attention, name).weight.double(), weight, rtol=1e-4, atol=1e-5)


def test_several_steps_follow_torch_muon_and_the_rest_is_torch_adamw_bit_for_bit() -> None:
    """Torch's Muon computes in bfloat16: within 2 % of the distance travelled."""
    torch.manual_seed(0)
    model, steps = Model(), gradients(Model(), 5)
    start = model.blocks[0].attention.out.weight.detach().clone()
    other = Model()
    other.load_state_dict(model.state_dict())
    train(model, build_optimizer([(model.named_parameters(), SETTINGS)]), steps)
    hidden = other.blocks[0].attention.out.weight
    train(other, torch.optim.Muon([hidden], 6e-2, 0.3, adjust_lr_fn="match_rms_adamw"), steps)
    ours = model.blocks[0].attention.out.weight
    assert (ours - hidden).norm() < 0.02 * (hidden - start).norm()
    plain = {"lr": 3e-2, "betas": SETTINGS.betas, "eps": SETTINGS.eps}
    groups = [{"params": [other.head.weight], "weight_decay": 0.3, **plain},
              {"params": [other.head.bias, *(m.bias for m in other.blocks[0].attention.children())],
               "weight_decay": 0.0, **plain}]  # fmt: skip
    train(other, torch.optim.AdamW(groups, fused=True), steps)
    for name, parameter in model.named_parameters():
        if name.startswith("head") or name.endswith("bias"):
            assert torch.equal(parameter, other.get_parameter(name)), name
