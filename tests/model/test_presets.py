"""Presets have their parameter counts; invalid settings are refused with the field, the value and the fix."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

from bestrq.model.conformer import ConformerEncoder
from bestrq.model.presets import PRESETS
from bestrq.model.settings import EncoderSettings, StageSettings
from common.config import from_dict, parse
from common.errors import UserError

NUM_PARAMETERS = {
    "quickstart": 1_310_768,
    "conformer-s": 8_374_464,
    "conformer-m": 26_270_720,
    "conformer-l": 110_637_568,
    "base-120m": 118_252_672,
    "bestrq-94m": 85_683_200,
    "slim-55m": 55_626_112,
    "fast-115m": 104_288_256,
    "large-600m": 582_534_144,
    "xl-1.1b": 1_017_363_456,
    "efficient-13m": 12_511_488,
    "efficient-31m": 28_291_336,
    "efficient-126m": 112_784_912,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_its_parameter_count(name: str) -> None:
    with torch.device("meta"):
        encoder = ConformerEncoder(PRESETS[name])
    assert sum(p.numel() for p in encoder.parameters()) == NUM_PARAMETERS[name]


def test_parameter_counts_are_listed_for_exactly_the_presets() -> None:
    assert set(NUM_PARAMETERS) == set(PRESETS)


def test_comparison_preset_has_the_shape_of_the_published_recipe() -> None:
    s = PRESETS["bestrq-94m"]
    shape = (s.num_layers, s.dim, s.feedforward_dim, s.num_heads, s.kernel_size)
    assert shape == (12, 576, 2048, 8, 31)


def test_a_preset_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["quickstart"].dropout = 0.5  # type: ignore[misc]


@dataclass(frozen=True)
class Config:
    """Settings of a script with an encoder."""

    encoder: EncoderSettings = field(default_factory=EncoderSettings)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_mels", 0),
        ("num_layers", 0),
        ("num_heads", 5),
        ("num_heads", 144),
        ("num_kv_heads", 3),
        ("num_kv_heads", -1),
        ("feedforward", "relu"),
        ("group_size", 0),
        ("kernel_size", 8),
        ("kernel_size", -3),
        ("convolution_norm", "group_norm"),
        ("norm", "batch_norm"),
        ("subsampling", "max_pool"),
        ("subsampling_factor", 8),
        ("mask", "full"),
        ("window", 0),
        ("chunk_size", 0),
        ("left_chunks", -2),
        ("dynamic_chunks", True),
        ("position", "sinus"),
        ("rotary_theta", 0.0),
        ("rotary_interpolation", -1.0),
        ("relative_buckets", 30),
        ("relative_max_distance", 16),
        ("dropout", 1.0),
        ("attention_dropout", -0.1),
        ("layer_drop", 1.0),
        ("activation_checkpointing", "some"),
        ("backend", "flash"),
    ],
)
def test_an_invalid_setting_is_refused_with_field_value_and_fix(name: str, value: object) -> None:
    """On the command line, in a recipe, and in the config.json of an export (read by `from_dict`)."""
    for read in (
        lambda: parse(Config, [f"--encoder.{name}={value}"]),
        lambda: from_dict(Config, {"encoder": {name: value}}),
        lambda: from_dict(EncoderSettings, {name: value}),
    ):
        with pytest.raises(UserError) as error:
            read()
        message = str(error.value)
        assert name in message and str(value) in message
        assert any(word in message for word in ("give", "expected"))


@pytest.mark.parametrize(
    "name, settings",
    [
        ("attention_dropout", {"backend": "flex"}),
        ("activation_checkpointing", {"convolution_norm": "batch_norm", "activation_checkpointing": "full"}),
        ("group_size", {"mask": "causal", "group_size": 2}),
        ("window", {"mask": "window", "window": 7, "group_size": 2}),
        ("chunk_size", {"mask": "chunk", "chunk_size": 6, "earlier_stages": [StageSettings(group_size=4)]}),
        ("earlier_stages", {"earlier_stages": [StageSettings(num_heads=7)]}),
    ],
)
def test_incompatible_settings_are_refused(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"encoder.{name}"):
        EncoderSettings(**settings)  # type: ignore[arg-type]


def test_an_invalid_setting_of_a_stage_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="earlier_stages: dim is 0: expected an integer above 0"):
        from_dict(EncoderSettings, {"earlier_stages": [{"dim": 0}]})


def test_the_stride_of_targets_includes_all_stages() -> None:
    efficient = PRESETS["efficient-13m"]
    assert (efficient.subsampling_factor, efficient.stride, efficient.row_multiple) == (2, 8, 24)
    assert (PRESETS["fast-115m"].stride, PRESETS["fast-115m"].row_multiple) == (8, 8)
