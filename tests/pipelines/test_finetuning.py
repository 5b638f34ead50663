"""Settings of fine-tuning: invalid values are refused before any work starts."""

import pytest

from common.config import load_yaml, parse, save_yaml, to_dict
from common.errors import UserError
from pipelines.finetuning import FinetuneConfig


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("finetune.reinitialise_top_blocks", "-1", "an integer, 0 or more"),
        ("finetune.freeze_encoder_steps", "-2", "an integer, 0 or more"),
        ("finetune.encoder_learning_rate", "-0.1", "a number, 0 or more"),
        ("finetune.label_minutes", "-1.0", "a number, 0 or more"),
        ("validation.every_steps", "0", "an integer above 0"),
        ("accumulation", "0", "an integer above 0"),
        ("validation.max_recordings", "-1", "an integer, 0 or more"),
        ("spec_augment.num_freq_masks", "-1", "an integer, 0 or more"),
        ("spec_augment.max_freq_width", "-1", "an integer, 0 or more"),
        ("spec_augment.num_time_masks", "-1", "an integer, 0 or more"),
        ("spec_augment.time_mask_period", "0", "an integer above 0"),
        ("spec_augment.max_time_width", "-1", "an integer, 0 or more"),
        ("spec_augment.max_time_share", "1.5", "a number from 0 to 1"),
        ("spec_augment.time_masks_per_frame", "1.5", "a number from 0 to 1"),
        ("hidden_masks.time_prob", "1.5", "a number from 0 to 1"),
        ("hidden_masks.channel_length", "0", "an integer above 0"),
        ("averaging.ema_decay", "1.5", "a number from 0 to 1"),
        ("averaging.last", "-1", "an integer, 0 or more"),
        ("data.augment.speed", "-0.1", "a number from 0 to 1"),
        ("finetune.layer_decay", "1.5", "a number from 0 to 1"),
    ],
)
def test_an_error_of_a_value_out_of_range_names_field_and_range(field: str, value: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(FinetuneConfig, [f"--{field}={value}"])
    assert str(caught.value) == f"{field} is {value}: expected {expected}"


def test_top_blocks_are_reinitialised_only_with_a_pretrained_encoder() -> None:
    with pytest.raises(UserError, match="finetune.reinitialise_top_blocks is 2, but finetune.init is empty: .* give 0"):
        parse(FinetuneConfig, ["--finetune.reinitialise_top_blocks=2"])
    parse(FinetuneConfig, ["--finetune.reinitialise_top_blocks=2", "--finetune.init=export"])


def test_settings_are_saved_as_plain_numbers(tmp_path) -> None:
    config = parse(FinetuneConfig, ["--finetune.label_minutes=10", "--validation.every_steps=3"])
    save_yaml(config, tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == to_dict(config)
    assert "label_minutes: 10.0\n" in (tmp_path / "config.yaml").read_text(encoding="utf-8")
