"""Memory of whole training steps at full size, counted on fake CUDA tensors, against the formula of docs/memory.md."""

from dataclasses import replace

import pytest
import torch

from benchmarks.fake_step import StepBytes, count_step, filled_rows
from bestrq.model.presets import PRESETS
from bestrq.model.settings import EncoderSettings
from bestrq.pretraining.quantizer import QuantizerSettings
from pipelines import memory_formula as formula

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: see cuda_runtime.py")

FRAMES = 6000


def step(settings: EncoderSettings, codes: int, rows: int = 4, segments: int = 4) -> StepBytes:
    quantizer = QuantizerSettings(num_codebooks=1, codebook_size=codes)
    return count_step(settings, quantizer, filled_rows(rows, FRAMES, segments, settings))


def predicted(settings: EncoderSettings, codes: int) -> float:
    """Bytes of activations of 4 rows, and of the bfloat16 weights outside of the blocks, which count as weights."""
    batch, mode = formula.Rows(4, FRAMES), settings.activation_checkpointing
    rest = formula.num_parameters(settings) + settings.dim * codes
    rest -= settings.num_layers * formula.block_weights(settings)
    return formula.activation_bytes(settings, batch, mode, dense=True, head_logits=codes / 3) + 2 * rest


@pytest.mark.parametrize(
    ("preset", "mode", "codes"),
    [
        ("base-120m", "none", 4 * 8192),
        ("base-120m", "selective", 4 * 8192),
        ("base-120m", "full", 4 * 8192),  # the peak is at the loss
        ("base-120m", "full", 64),  # the peak is in the backward pass of a block
        ("fast-115m", "none", 64),
        ("large-600m", "full", 64),  # the gradient of a matrix is larger than those of the frames
    ],
)
def test_the_peak_of_a_step_is_that_of_the_formula(preset: str, mode: str, codes: int) -> None:
    settings = replace(PRESETS[preset], activation_checkpointing=mode)
    counted = step(settings, codes)
    assert counted.peak == pytest.approx(predicted(settings, codes), rel=0.1)
    assert counted.update < 1e6


def test_the_backward_pass_has_the_bytes_of_the_formula() -> None:
    """Between two numbers of rows, so that weights and their gradients cancel: the largest part is a block, computed
    again."""
    settings = replace(PRESETS["base-120m"], num_layers=3, activation_checkpointing="full")
    four, eight = step(settings, 64, rows=4), step(settings, 64, rows=8)
    backward = (eight.peak - eight.kept) - (four.peak - four.kept)
    batch = formula.Rows(4, FRAMES)
    constant = formula.backward_bytes(settings, formula.Rows(0, FRAMES), "cuda", "full")
    expected = formula.backward_bytes(settings, batch, "cuda", "full") - constant
    assert backward == pytest.approx(expected, rel=0.1)


def test_logits_take_the_bytes_of_the_formula() -> None:
    """The loss is the peak in both cases, which differ in the number of codes."""
    settings = replace(PRESETS["base-120m"], num_layers=1, activation_checkpointing="full")
    few, many = step(settings, 2**15), step(settings, 2**16)
    logits = 4 * FRAMES // 4 // 3 * 2**15
    weights = 2 * settings.dim * 2**15
    assert many.peak - few.peak == pytest.approx(formula.HEAD * logits + weights, rel=0.02)
