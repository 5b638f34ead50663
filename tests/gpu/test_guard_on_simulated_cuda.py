"""The guard on a GPU: a bad step is skipped without the host, which learns of it one step later; simulated device."""

import math

import pytest
import torch
from torch import nn

from bestrq.training.optimizer import (
    GuardSettings,
    OptimizerSettings,
    StepGuard,
    StepResult,
    build_optimizer,
    set_learning_rates,
)
from bestrq.training.process import World
from tests.gpu.simulated_cuda import simulated_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests marked cuda use it")
WORLD = World(device=torch.device("cuda", 0))


def steps(scales: list[float], max_bad: int = 5) -> tuple[list[StepResult], list[bool]]:
    """Results of the guard for steps with the loss multiplied by these; and whether each changed the weights."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).to("cuda")
    optimizer = build_optimizer([(model.named_parameters(), OptimizerSettings(warmup_steps=0))])
    set_learning_rates(optimizer, 1, 10)
    guard = StepGuard(GuardSettings(max_bad_updates=max_bad))
    results, changed = [], []
    for number, scale in enumerate(scales, start=1):
        before = model.weight.detach().cpu().clone()
        loss = scale * model(torch.ones(1, 3, device="cuda")).sum()
        loss.backward()
        results.append(guard.apply(number, model, optimizer, loss.detach(), 0.5, WORLD, [f"sample-{number}"]))
        changed.append(not torch.equal(before, model.weight.detach().cpu()))
    return results, changed


def test_a_bad_step_changes_nothing_and_is_reported_with_its_own_samples_one_step_later(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with simulated_cuda():
        results, changed = steps([1.0, math.nan, 1.0, 1.0])
    assert changed == [True, False, True, True]
    assert [result.applied for result in results] == [True, True, False, True]
    assert math.isnan(results[0].grad_norm) and results[1].grad_norm == pytest.approx(results[3].grad_norm)
    error = capsys.readouterr().err
    assert "step 2 skipped" in error and "loss of rank 0: nan" in error
    assert "sample-2" in error and "sample-1" not in error and "sample-3" not in error


def test_bad_steps_in_a_row_end_the_run() -> None:
    with simulated_cuda(), pytest.raises(RuntimeError, match="2 steps in a row"):
        steps([1.0, math.nan, math.nan, 1.0], max_bad=2)


def test_a_step_waits_only_for_the_numbers_of_the_step_before() -> None:
    with simulated_cuda() as gpu:
        steps([1.0])  # the first step has nothing to wait for
        first = dict(gpu.waits)
    assert not any("optimizer.py" in place or "process.py" in place for _, place in first), first
