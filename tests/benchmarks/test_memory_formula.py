"""Memory formula against counts on the CPU and on a simulated GPU, and docs/memory.md against the formula."""

from dataclasses import replace

import pytest
import torch

from benchmarks.activation_memory import count
from bestrq.model.activation_checkpointing import MODES
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.presets import PRESETS
from pipelines import memory_formula as formula
from pipelines.live_bytes import LiveBytes
from tests.paths import REPOSITORY

DOCS = REPOSITORY / "docs/memory.md"
SMALL = EncoderSettings(dim=96, num_layers=1, num_heads=4, feedforward_dim=224, kernel_size=15, subsampling_channels=24)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_block_keeps_the_bytes_of_the_formula(device: str, mode: str) -> None:
    batch = formula.Rows(2, 4 * 160)
    counted = count("block", SMALL, batch, device, mode).now
    assert formula.block_bytes(SMALL, batch, device, mode) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("device, kind, factor", formula.SUBSAMPLING)
def test_the_subsampling_keeps_the_bytes_of_the_formula(device: str, kind: str, factor: int) -> None:
    settings = replace(SMALL, subsampling=kind, subsampling_factor=factor)
    one, two = (formula.Rows(rows, 1600) for rows in (1, 2))
    growth = count("subsampling", settings, two, device).now - count("subsampling", settings, one, device).now
    assert formula.subsampling_bytes(settings, one, device) == pytest.approx(growth, rel=0.02)


@pytest.mark.parametrize("preset", ["base-120m", "large-600m"])
def test_the_formula_counts_the_weights_of_the_encoder(preset: str) -> None:
    settings = PRESETS[preset]
    with torch.device("meta"):
        encoder = ConformerEncoder(settings)
    assert formula.num_parameters(settings) == sum(p.numel() for p in encoder.parameters())
    matrices = sum(p.numel() for p in encoder.blocks[0].parameters() if p.ndim > 1)
    assert formula.block_weights(settings) == matrices


def test_rows_that_fit_are_the_most_within_the_budget() -> None:
    settings = PRESETS["base-120m"]
    for mode in MODES:
        rows = formula.rows_that_fit(settings, 6000, mode)
        available = formula.BUDGET - formula.weight_bytes(settings, 1)
        needed = [formula.activation_bytes(settings, formula.Rows(n, 6000), mode) for n in (rows, rows + 1)]
        assert needed[0] <= available < needed[1]


def test_tables_of_the_docs_are_those_of_the_formula() -> None:
    """If this fails, copy the output of `python -m benchmarks.activation_memory --table` into docs/memory.md."""
    assert formula.tables().strip() in DOCS.read_text()


def test_live_bytes_counts_a_storage_once_and_until_it_is_freed() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(100, dtype=torch.float64)
        view = kept.view(10, 10).mT
        other = kept + 1
        assert live.now == 1600
        del other
        assert live.now == 800
        del kept
        assert live.now == 800 and live.peak == 1600 and view.sum() == 0
