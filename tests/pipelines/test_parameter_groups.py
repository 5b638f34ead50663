"""Kept, fresh and head parameters of fine-tuning: rates, decay from block to block, freezing."""

from typing import Any

import pytest
import torch

from bestrq.model.settings import StageSettings
from bestrq.recognition.ctc import CTCModel
from bestrq.training.optimizer import build_optimizer, set_learning_rates
from common.config import parse
from common.errors import UserError
from common.segments import Segments
from pipelines.finetuning import FinetuneConfig
from pipelines.parameter_groups import frozen_blocks, parameter_groups
from tests.tiny import ENCODER


def make(*options: str) -> tuple[FinetuneConfig, CTCModel]:
    rate = ["--optimizer.learning_rate=0.5", "--optimizer.warmup_steps=0", "--optimizer.schedule=constant"]
    config = parse(FinetuneConfig, [*ENCODER, "--encoder.num_layers=4", *rate, *options])
    return config, CTCModel(config.encoder, 5)


def rates(config: FinetuneConfig, model: CTCModel, step: int = 1) -> dict[str, float]:
    """Learning rate of every parameter in a step."""
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), config))
    set_learning_rates(optimizer, step, 100)
    rate = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: rate[parameter] for name, parameter in model.named_parameters()}


def by_place(values: dict[str, Any]) -> dict[str, set[Any]]:
    """Values of the parameters of every part: subsampling, blocks.0, ..., layer_sum, head."""
    parts: dict[str, set[Any]] = {}
    for name, value in values.items():
        words = name.removeprefix("encoder.").split(".")
        parts.setdefault(".".join(words[: 2 if words[0] == "blocks" else 1]), set()).add(value)
    return parts


def test_kept_parameters_have_the_encoders_rate_and_fresh_blocks_and_head_the_optimizers() -> None:
    kept = ["--finetune.init=export", "--finetune.encoder_learning_rate=0.25", "--encoder.output=weighted_sum"]
    assert by_place(rates(*make(*kept, "--finetune.reinitialise_top_blocks=1"))) == {
        "subsampling": {0.25}, "blocks.0": {0.25}, "blocks.1": {0.25}, "blocks.2": {0.25}, "blocks.3": {0.5},
        "layer_sum": {0.5}, "head": {0.5},
    }  # fmt: skip


def test_rates_decay_from_the_top_kept_block_to_the_subsampling_with_every_schedule_step() -> None:
    decay = ["--finetune.init=export", "--finetune.encoder_learning_rate=0.25", "--finetune.layer_decay=0.5"]
    options = [*decay, "--finetune.reinitialise_top_blocks=1"]
    expected = {
        "subsampling": {0.25 / 8}, "blocks.0": {0.25 / 4}, "blocks.1": {0.25 / 2}, "blocks.2": {0.25},
        "blocks.3": {0.5}, "head": {0.5},
    }  # fmt: skip
    assert by_place(rates(*make(*options))) == expected
    warm = by_place(rates(*make(*options, "--optimizer.warmup_steps=10"), step=5))
    assert warm == {part: {value / 2 for value in values} for part, values in expected.items()}


def test_every_parameter_is_in_one_group_and_the_last_group_is_the_top_of_the_kept_blocks() -> None:
    config, model = make(
        "--finetune.init=export", "--finetune.layer_decay=0.5", "--finetune.encoder_learning_rate=0.25"
    )
    groups = parameter_groups(model.named_parameters(), config)
    names = [name for named, _ in groups for name, _ in named]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert [settings.learning_rate for _, settings in (groups[0], groups[-1])] == [0.5, 0.25]


def test_without_a_pretrained_encoder_nothing_is_kept_frozen_or_slower() -> None:
    options = ["--finetune.encoder_learning_rate=0.25", "--finetune.layer_decay=0.5"]
    config, model = make(*options, "--finetune.freeze_encoder_steps=3")
    assert set(rates(config, model).values()) == {0.5}
    assert frozen_blocks(config, 1) is None


@pytest.mark.parametrize("stages", [[], [StageSettings(2, 8, 2, 12)]], ids=["one stage", "two stages"])
def test_only_kept_blocks_are_frozen_and_only_in_the_first_steps(stages: list[StageSettings]) -> None:
    config, _ = make("--finetune.init=export", "--finetune.freeze_encoder_steps=3")
    object.__setattr__(config.encoder, "earlier_stages", stages)
    config.finetune.reinitialise_top_blocks = 1
    total = 4 + 2 * len(stages)
    assert [frozen_blocks(config, step) for step in (1, 3, 4)] == [total - 1, total - 1, None]


@pytest.mark.parametrize("frozen", [0, 2, 4])
def test_frozen_blocks_get_no_gradient_and_no_optimizer_state_and_others_the_same_as_before(frozen: int) -> None:
    """Gradients of the trained parameters are those without freezing; weights and state of the frozen ones stay."""
    calm = ["--encoder.dropout=0", "--encoder.attention_dropout=0", "--finetune.init=export"]
    fresh = f"--finetune.reinitialise_top_blocks={4 - frozen}"
    config, model = make(*calm, "--finetune.freeze_encoder_steps=1", fresh, "--encoder.output=weighted_sum")
    log_mel, segments, labels, lengths = batch()
    model(log_mel, segments, labels, lengths).loss_sum.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), config))
    set_learning_rates(optimizer, 1, 10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(log_mel, segments, labels, lengths, frozen_blocks=frozen_blocks(config, 1)).loss_sum.backward()
    optimizer.step()
    kept = ("encoder.subsampling.", *(f"encoder.blocks.{number}." for number in range(frozen)))
    for name, parameter in model.named_parameters():
        is_frozen = name.startswith(kept)
        assert (parameter.grad is None) == is_frozen, name
        assert (parameter in optimizer.state) != is_frozen, name
        assert torch.equal(parameter, before[name]) == (is_frozen or not bool(expected[name].any())), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7)


def batch() -> tuple[Any, ...]:
    torch.manual_seed(1)
    segments = Segments(torch.tensor([[0, 84]]), torch.tensor([[80, 60]]), 144)
    return torch.randn(1, 144, 80), segments, torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])


def test_settings_that_need_a_pretrained_encoder_or_freeze_all_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="finetune.drop_top_blocks is 2, but finetune.init is empty: .* give 0"):
        parse(FinetuneConfig, ["--finetune.drop_top_blocks=2"])
    with pytest.raises(UserError, match="finetune.layer_decay is 0, which freezes all blocks but one"):
        parse(FinetuneConfig, ["--finetune.layer_decay=0"])
