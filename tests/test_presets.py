"""Presets are as large as they say, and impossible settings are refused with the field, the value and the fix."""

import dataclasses

import pytest
import torch

from bestrq.config import ConfigError
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.presets import PRESETS
from bestrq.model.settings import EncoderSettings

NUM_PARAMETERS = {"quickstart": 3_002_320, "base-120m": 118_252_672, "bestrq-94m": 85_683_200}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_parameter_count(name: str) -> None:
    with torch.device("meta"):
        encoder = ConformerEncoder(PRESETS[name])
    assert sum(p.numel() for p in encoder.parameters()) == NUM_PARAMETERS[name]


def test_every_preset_is_counted_and_no_other() -> None:
    assert set(NUM_PARAMETERS) == set(PRESETS)


def test_comparison_preset_has_the_shape_of_the_published_recipe() -> None:
    s = PRESETS["bestrq-94m"]
    shape = (s.num_layers, s.dim, s.feedforward_dim, s.num_heads, s.kernel_size)
    assert shape == (12, 576, 2048, 8, 31)


def test_settings_cannot_be_changed_behind_a_preset() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["quickstart"].dropout = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_mels", 0),
        ("num_layers", 0),
        ("num_heads", 5),
        ("num_heads", 144),
        ("kernel_size", 8),
        ("kernel_size", -3),
        ("subsampling_factor", 8),
        ("dropout", 1.0),
        ("attention_dropout", -0.1),
        ("position", "sinus"),
        ("rotary_theta", 0.0),
        ("norm", "batch_norm"),
        ("backend", "flex"),
    ],
)
def test_impossible_setting_names_field_value_and_fix(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        EncoderSettings(**{field: value})  # type: ignore[arg-type]
    message = str(error.value)
    assert f"encoder.{field}" in message and repr(value) in message and ("give" in message or "choose" in message)
