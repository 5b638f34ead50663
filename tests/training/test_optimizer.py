"""Learning rates as a function of the step, groups of the optimizers, seeds, the guard against non-finite numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from bestrq.training.checkpoint import CheckpointSettings
from bestrq.training.optimizer import (
    GuardSettings,
    OptimizerSettings,
    StepGuard,
    StepResult,
    build_optimizer,
    learning_rate_factor,
    seed_step,
    set_learning_rates,
)
from bestrq.training.process import DistributedSettings, World
from bestrq.training.run_folder import RunSettings
from common.config import parse
from common.errors import UserError

NAMES = ("adamw", "muon", "madgrad")


def test_the_warm_up_is_a_straight_line_to_the_peak_for_every_schedule() -> None:
    for schedule in ("cosine", "noam", "constant", "tri_stage", "wsd"):
        settings = OptimizerSettings(warmup_steps=10, schedule=schedule)
        factors = [learning_rate_factor(settings, step, 100) for step in range(1, 11)]
        assert factors == pytest.approx([step / 10 for step in range(1, 11)])


def test_schedules_follow_their_closed_forms_after_the_warm_up() -> None:
    cosine = OptimizerSettings(warmup_steps=10, schedule="cosine", final_fraction=0.1)
    assert learning_rate_factor(cosine, 55, 100) == pytest.approx(0.55)  # half way: the mean of 1 and 0.1
    assert learning_rate_factor(cosine, 100, 100) == pytest.approx(0.1)
    assert learning_rate_factor(cosine, 170, 100) == pytest.approx(0.1)
    noam = OptimizerSettings(warmup_steps=10, schedule="noam")
    assert learning_rate_factor(noam, 40, 100) == pytest.approx(math.sqrt(10 / 40))
    assert learning_rate_factor(OptimizerSettings(warmup_steps=0, schedule="constant"), 1, 100) == 1.0


def test_the_peak_is_held_and_then_decays_exponentially_or_linearly_to_the_final_fraction() -> None:
    """Stages of 0.1, 0.4 and 0.5 of the steps, as in fairseq's recipes of wav2vec 2.0."""
    for schedule, half_way in (("tri_stage", math.sqrt(0.05)), ("wsd", 0.525)):
        settings = OptimizerSettings(warmup_steps=100, schedule=schedule, hold_fraction=0.4, final_fraction=0.05)
        factors = [learning_rate_factor(settings, step, 1000) for step in range(1, 1101)]
        assert factors[99:500] == [1.0] * 401
        assert factors[749] == pytest.approx(half_way) and factors[999:] == pytest.approx([0.05] * 101)
        later = OptimizerSettings(**{**settings.__dict__, "frozen_steps": 50})
        assert [learning_rate_factor(later, step + 50, 1050) for step in range(1, 1101)] == pytest.approx(factors)
        decay = factors[499:1000]
        pairs = list(zip(decay[:-1], decay[1:], strict=True))
        steps = [b / a if schedule == "tri_stage" else b - a for a, b in pairs]
        assert max(steps) == pytest.approx(min(steps))
    assert learning_rate_factor(OptimizerSettings(warmup_steps=0, schedule="wsd", final_fraction=0), 9, 9) == 0


def test_weights_decay_and_biases_and_norms_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(1, 2, 3))
    optimizer = build_optimizer([(model.named_parameters(), OptimizerSettings(weight_decay=0.3))])
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {name: decay[parameter] for name, parameter in model.named_parameters()} == {
        "0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.3, "2.bias": 0.0}  # fmt: skip


def test_the_default_is_torchs_fused_adamw() -> None:
    """Bit for bit, with the hyperparameters of the settings."""
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    settings = OptimizerSettings(betas=(0.8, 0.9), eps=1e-5, weight_decay=0.2, warmup_steps=0, schedule="constant")
    values = {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-5}
    groups = [{"params": [other.weight], "weight_decay": 0.2}, {"params": [other.bias], "weight_decay": 0.0}]
    plain = torch.optim.AdamW([{**group, **values} for group in groups], fused=True)
    optimizer = build_optimizer([(model.named_parameters(), settings)])
    for step in range(1, 4):
        set_learning_rates(optimizer, step, 3)
        for module, stepped in ((model, optimizer), (other, plain)):
            module(torch.ones(1, 3)).square().sum().backward()
            stepped.step()
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


@pytest.mark.parametrize("name", NAMES)
def test_encoder_and_head_have_their_own_rates_and_a_frozen_group_does_not_move(name: str) -> None:
    encoder, head = nn.Linear(3, 3), nn.Linear(3, 2)
    slow = OptimizerSettings(name=name, learning_rate=1e-3, warmup_steps=0, schedule="constant", frozen_steps=2)
    fast = replace(slow, learning_rate=1e-2, frozen_steps=0)
    named = [(f"encoder.blocks.0.{name}", parameter) for name, parameter in encoder.named_parameters()]
    optimizer = build_optimizer([(named, slow), (head.named_parameters(), fast)])
    start = encoder.weight.detach().clone()
    for step in range(1, 4):
        before = head.weight.detach().clone()
        rates = set_learning_rates(optimizer, step, 10)
        assert rates == [0.0 if step <= 2 else 1e-3, 1e-2]
        head(encoder(torch.ones(1, 3))).sum().backward()
        optimizer.step()
        assert torch.equal(encoder.weight, start) == (step <= 2)
        assert not torch.equal(head.weight, before)


def test_parameters_without_gradient_are_left_out_and_none_at_all_is_an_error() -> None:
    model = nn.Linear(3, 3).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        build_optimizer([(model.named_parameters(), OptimizerSettings())])


@dataclass
class Config:
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    run: RunSettings = field(default_factory=RunSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer.learning_rate", "0.0"), ("optimizer.final_fraction", "1.5"), ("optimizer.clip_norm", "-1.0"),
     ("optimizer.warmup_steps", "-1"), ("guard.max_bad_updates", "0"), ("guard.spike_window", "7"),
     ("guard.spike_sigma", "0.0"), ("run.steps", "0"), ("run.log_every", "0"), ("checkpoint.every_steps", "0"),
     ("checkpoint.keep_last", "0"), ("distributed.threads", "-1"), ("distributed.timeout_minutes", "0.0")],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name_and_value(name: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{name} is {value}: (expected|give)"):
        parse(Config, [f"--{name}={value}"])


def test_decay_rates_of_1_and_noam_without_warm_up_are_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer.betas is \(0.9, 1.0\): give two numbers from 0 to below 1"):
        parse(Config, ["--optimizer.betas=[0.9, 1.0]"])
    with pytest.raises(UserError, match=r"optimizer.warmup_steps is 0 with optimizer.schedule 'noam'"):
        parse(Config, ["--optimizer.warmup_steps=0", "--optimizer.schedule=noam"])
    with pytest.raises(UserError, match=r"optimizer.final_fraction is 0 with optimizer.schedule 'tri_stage'"):
        parse(Config, ["--optimizer.final_fraction=0", "--optimizer.schedule=tri_stage"])


def test_what_a_step_draws_depends_on_seed_step_and_rank_and_on_nothing_else() -> None:
    def draw(seed: int, step: int, rank: int) -> list[float]:
        seed_step(seed, step, rank)
        return torch.rand(4).tolist()

    first = draw(1, 2, 0)
    torch.rand(1000)
    assert draw(1, 2, 0) == first
    others = [draw(2, 2, 0), draw(1, 3, 0), draw(1, 2, 1), draw(12, 0, 0), draw(1, 20, 0)]
    assert all(other != first for other in others) and len({tuple(other) for other in others}) == len(others)


def guarded(
    settings: GuardSettings | None = None, name: str = "adamw"
) -> tuple[nn.Module, torch.optim.Optimizer, StepGuard]:
    """A linear layer whose weight Muon would train."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    named = [(f"encoder.blocks.0.{parameter}", value) for parameter, value in model.named_parameters()]
    optimizer = build_optimizer([(named, OptimizerSettings(name=name, warmup_steps=0))])
    set_learning_rates(optimizer, 1, 10)
    return model, optimizer, StepGuard(settings or GuardSettings())


def update(parts: tuple[nn.Module, torch.optim.Optimizer, StepGuard], scale: float) -> StepResult:
    model, optimizer, guard = parts
    loss = scale * model(torch.ones(1, 3)).square().sum()
    loss.backward()
    return guard.apply(1, model, optimizer, loss.detach(), 0.0, World())


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of weights and optimizer state."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{key}/{name}": value.clone() for key, value in optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_update_changes_no_weight_and_no_optimizer_state(name: str, bad: float) -> None:
    """Neither at the first step, which creates the state, nor later: as without the bad steps, bit for bit."""
    parts, undisturbed = guarded(name=name), guarded(name=name)
    model, optimizer, _ = parts
    for scale in (bad, 1.0, bad, bad, 2.0):
        before = tensors_of(model, optimizer)
        applied = update(parts, scale).applied
        assert applied == math.isfinite(scale) and all(parameter.grad is None for parameter in model.parameters())
        if applied:
            update(undisturbed, scale)
        found, expected = tensors_of(model, optimizer), tensors_of(*undisturbed[:2])
        assert torch.equal(found["weight"], before["weight"]) != applied
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        assert not any(tensor.any() for key, tensor in found.items() if key not in expected and "start/" not in key)


def test_a_non_finite_loss_with_finite_gradients_is_bad_too() -> None:
    model, optimizer, guard = guarded()
    model(torch.ones(1, 3)).sum().backward()
    assert not guard.apply(1, model, optimizer, torch.tensor(math.inf), 0.0, World()).applied


def test_bad_updates_in_a_row_end_the_run_and_a_good_one_between_starts_the_count_again() -> None:
    parts = guarded(GuardSettings(max_bad_updates=3))
    for scale in (math.nan, math.nan, 1.0, math.nan, math.nan):
        update(parts, scale)
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        update(parts, math.nan)


def test_clipping_scales_the_whole_gradient_to_the_norm_and_reports_the_norm_before() -> None:
    model, _, guard = guarded()
    plain = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss = 100 * model(torch.ones(1, 3)).sum()
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    result = guard.apply(1, model, plain, loss.detach(), 0.5, World())
    moves = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    moved = math.sqrt(sum(float(move.square().sum()) for move in moves))
    assert result.grad_norm == pytest.approx(norm) and moved == pytest.approx(0.5, rel=1e-4)


def test_a_spike_is_flagged_and_applied_and_ordinary_noise_is_not() -> None:
    parts = guarded()
    assert not any(update(parts, 1.0 + 0.1 * (step % 5)).spike for step in range(20))
    result = update(parts, 20.0)
    assert result.spike and result.applied
