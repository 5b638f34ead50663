"""FLOPs of a step and peaks of GPUs, which give the MFU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from bestrq.model import layout
from bestrq.model.settings import EncoderSettings, StageSettings
from bestrq.pretraining.cost import attention_flops, flops_per_row
from bestrq.pretraining.objective import BestRQ
from bestrq.pretraining.quantizer import QuantizerSettings
from bestrq.training.flops import GPU_PEAKS, gpu_peak
from common.segments import Segments

aten = torch.ops.aten
SETTINGS = EncoderSettings(
    num_mels=8, dim=32, num_layers=2, num_heads=2, feedforward_dim=32, subsampling_channels=4, backend="flex",
    attention_dropout=0.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tera"),
    [("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
     ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989),
     ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA GH200 480GB", 989), ("NVIDIA H200", 989),
     ("NVIDIA H200 NVL", 835), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
     ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Tesla V100", None),
     ("NVIDIA L400", None), ("NVIDIA A1000", None)],
)  # fmt: skip
def test_the_peak_is_that_of_the_product_with_this_name(name: str, tera: float | None) -> None:
    assert gpu_peak(name) == (None if tera is None else tera * 1e12)


def test_every_peak_is_found_by_its_own_name() -> None:
    assert {name: gpu_peak(f"NVIDIA {name}") for name in GPU_PEAKS} == GPU_PEAKS


def count_as_on_a_gpu(
    model: BestRQ, row_frames: int, segment_frames: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> int:
    """FLOPs of a row with a backend, whose attention operators are counted as on a GPU."""
    monkeypatch.setattr(layout, "choose_backend", lambda *_: backend)
    on_gpu, on_cpu = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setitem(flop_registry, on_cpu, flop_registry[on_gpu])
    return flops_per_row(model, row_frames, segment_frames, torch.device("cpu"))


def count(changes: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """FLOPs of a row of three equal segments."""
    model = BestRQ(replace(SETTINGS, **changes), QuantizerSettings(num_codebooks=1, codebook_size=8))
    # Segments of 96 or 192 frames in every stage: the CPU rounds keys up to a multiple of 32.
    length = 4 * 192 * changes.get("group_size", 1)
    row_frames = 3 * length + 2 * model.encoder.settings.row_multiple
    return count_as_on_a_gpu(model, row_frames, length, backend, monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [{}, {"group_size": 3}, {"num_kv_heads": 1}, {"position": "relative"},
     {"earlier_stages": [StageSettings(dim=16, num_layers=1, num_heads=2, feedforward_dim=16)]}],
    ids=["plain", "groups", "shared keys", "bias", "stages"],
)  # fmt: skip
def test_attention_between_segments_is_not_counted(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes no products between segments; 'dense' stands for compiled kernels while FLOPs are counted."""
    assert count(changes, "dense", monkeypatch) == count(changes, "segments", monkeypatch)


def test_a_row_is_filled_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap between segments leaves less than half a row for the second half, which counts too."""
    model = BestRQ(SETTINGS, QuantizerSettings(num_codebooks=1, codebook_size=8))
    whole, halves = (count_as_on_a_gpu(model, 800, length, "dense", monkeypatch) for length in (800, 400))
    per_pair = 3 * 4 * SETTINGS.num_layers * SETTINGS.dim
    # The depthwise convolutions of two segments, with zeros between them, have slightly more FLOPs than those of one.
    assert whole - halves == pytest.approx(per_pair * (200**2 - 100**2 - 99**2), rel=0.01)


def test_attention_counts_the_pairs_that_the_mask_allows() -> None:
    starts, lengths = torch.tensor([[0, 404]]), torch.tensor([[400, 203]])
    segments = Segments(starts, lengths, 800)
    per_pair = 4 * SETTINGS.num_layers * SETTINGS.dim
    frames = [100, 51]  # of the encoder: a partial frame counts as one
    assert attention_flops(SETTINGS, segments) == per_pair * sum(n * n for n in frames)
    causal = replace(SETTINGS, mask="causal")
    assert attention_flops(causal, segments) == per_pair * sum(n * (n + 1) // 2 for n in frames)
    window = replace(SETTINGS, mask="window", window=5)
    assert attention_flops(window, segments) == per_pair * sum(11 * n - 2 * 15 for n in frames)
