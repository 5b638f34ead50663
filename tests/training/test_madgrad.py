"""MADGRAD against the formulas of its paper in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bestrq.training.optimizer import OptimizerSettings, build_optimizer, learning_rate_factor, set_learning_rates

STEPS = 40


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_updates_follow_algorithm_1_of_the_paper(momentum: float) -> None:
    """Defazio and Jelassi, arXiv 2101.11075, algorithm 1, with the L2 penalty for matrices only."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    settings = OptimizerSettings(
        name="madgrad", learning_rate=2e-2, betas=(momentum, 0.98), eps=1e-6, weight_decay=0.05, warmup_steps=4
    )
    optimizer = build_optimizer([(model.named_parameters(), settings)])
    generator = np.random.default_rng(0)
    grads = {name: generator.normal(size=(STEPS, *p.shape)) for name, p in model.named_parameters()}
    start = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    for step in range(1, STEPS + 1):
        set_learning_rates(optimizer, step, STEPS)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(grads[name][step - 1]).float()
        optimizer.step()
    for name, parameter in model.named_parameters():
        x = x0 = start[name]
        s, v = np.zeros_like(x), np.zeros_like(x)
        for k in range(STEPS):
            rate = 2e-2 * learning_rate_factor(settings, k + 1, STEPS) * np.sqrt(k + 1)
            grad = grads[name][k] + (0.05 if name == "weight" else 0.0) * x
            s = s + rate * grad
            v = v + rate * grad**2
            z = x0 - s / (np.cbrt(v) + 1e-6)
            x = momentum * x + (1 - momentum) * z
        assert np.abs(x - x0).max() > 0.05
        np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=2e-5, atol=2e-6)


def test_a_parameter_without_a_gradient_keeps_its_value_and_has_no_state() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer([(model.named_parameters(), OptimizerSettings(name="madgrad", warmup_steps=0))])
    set_learning_rates(optimizer, 1, 9)
    model.bias.grad = torch.ones(2)
    weight = model.weight.detach().clone()
    optimizer.step()
    assert set(optimizer.state) == {model.bias} and torch.equal(model.weight, weight)
