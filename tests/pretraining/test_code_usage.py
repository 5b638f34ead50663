"""Usage of the codes: counted per codebook, collapsed without normalisation, with an alarm then and only then."""

import pytest
import torch

from bestrq.pretraining.alarms import Alarms
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from bestrq.pretraining.reporting import codebook_figures, count_codes

SIZE = 1024


def usage(stacks: torch.Tensor) -> dict:
    """Figures of the codes of `[N, 320]` stacks."""
    quantizer = RandomProjectionQuantizer(QuantizerSettings(codebook_size=SIZE), 320)
    counts = torch.zeros(1, SIZE, dtype=torch.int64)
    count_codes(counts, quantizer(stacks))
    return codebook_figures(counts)


def alarms(figures: dict) -> list[str]:
    """Names of the alarms of a log interval with these figures, and a healthy loss."""
    interval = {"mask_share": 0.4, "loss": 3.0, "accuracy": 0.2}
    return [alarm.name for alarm in Alarms(SIZE, warmup_steps=0).loss_alarms(1, figures | interval)]


def test_codes_are_counted_per_codebook() -> None:
    """Ids of different codebooks are different codes: pooled, the counts would hide that the second has collapsed."""
    counts = torch.zeros(2, 4, dtype=torch.int64)
    count_codes(counts, torch.tensor([[0, 1], [1, 1], [2, 1], [3, 1]]))
    assert counts.tolist() == [[1, 1, 1, 1], [0, 4, 0, 0]]
    figures = codebook_figures(counts)
    assert figures["codebook_usage"] == [1.0, 0.25]
    assert figures["codebook_perplexity"] == pytest.approx([4.0, 1.0])
    assert figures["perplexity"] == pytest.approx(1.0), "that of the worst codebook"
    assert figures["targets_seen"] == 4


def test_features_that_are_not_normalised_collapse_with_an_alarm() -> None:
    """Log-mel with its mean, here -9 to -1 by bin, projects to a narrow cone on the sphere: few codes are nearest."""
    normalised = torch.randn(20_000, 320, generator=torch.Generator().manual_seed(1))
    mean = torch.linspace(-9, -1, 80).repeat(4)
    figures = usage(normalised)
    assert figures["perplexity"] > SIZE / 2
    assert alarms(figures) == []
    figures = usage(0.5 * normalised + mean)
    assert figures["perplexity"] < SIZE / 100
    assert alarms(figures) == ["targets: collapse"]
