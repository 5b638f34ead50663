"""Precision of the residual stream under autocast to bfloat16."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from benchmarks.residual_error import SETTINGS, errors
from bestrq.model.activation_checkpointing import MODES
from bestrq.model.conformer import ConformerEncoder
from bestrq.model.settings import CheckpointingMode, StageSettings
from common.segments import Segments


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("residual", ["auto", "float32", "bfloat16"])
def test_blocks_pass_on_the_precision_of_the_setting(
    residual: Literal["auto", "float32", "bfloat16"], mode: CheckpointingMode
) -> None:
    """In the second stage too; without autocast there is one precision."""
    stages = [StageSettings(num_layers=2, dim=24, num_heads=2, feedforward_dim=32)]
    settings = replace(
        SETTINGS, dim=32, num_layers=2, earlier_stages=stages, residual=residual, activation_checkpointing=mode
    )
    encoder, received = ConformerEncoder(settings), []
    segments = Segments(torch.tensor([[0, 408]]), torch.tensor([[400, 390]]), 800)
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda block, args: received.append(args[0].dtype))
    for autocast in (True, False):
        received.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            encoder(torch.randn(1, 800, 80), encoder.layout(segments))
        low = autocast and residual != "float32"  # 'auto' on a CPU, whose norms return bfloat16
        assert received == 4 * [torch.bfloat16 if low else torch.float32]


def test_float32_has_the_smaller_error() -> None:
    """Against float64: the stream in bfloat16 is rounded at every sum."""
    low, high = errors(6, "bfloat16", seed=0), errors(6, "float32", seed=0)
    assert 1e-4 < high[0] < 0.6 * low[0] and low[0] < 0.02
    assert 1e-4 < high[1] < 0.95 * low[1] and low[1] < 0.03
