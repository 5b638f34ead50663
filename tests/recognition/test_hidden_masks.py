"""Masks on the outputs of the subsampling: shares, spans, independence of packing, effect on the encoder."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import StageSettings
from bestrq.recognition.hidden_masks import HiddenMaskSettings, draw_hidden_masks
from common.segments import Segments

ENCODER = EncoderSettings(num_mels=8, dim=128, num_heads=2, num_layers=2, feedforward_dim=16, subsampling_channels=2)
CPU = torch.device("cpu")


def rows(segments: list[list[tuple[int, int, int]]], num_frames: int) -> Segments:
    """Rows of segments (start, length, seed) in mel frames."""
    slots = max(len(row) for row in segments)
    padded = torch.tensor([row + [(0, 0, 0)] * (slots - len(row)) for row in segments])
    return Segments(padded[..., 0], padded[..., 1], num_frames, padded[..., 2])


def draw(segments: Segments, settings: HiddenMaskSettings, encoder: EncoderSettings = ENCODER) -> Tensor:
    masks = draw_hidden_masks(segments, encoder, settings, CPU)
    assert masks is not None
    return masks


BOTH = HiddenMaskSettings(time_prob=0.3, time_length=5, channel_prob=0.3, channel_length=16)


def test_masks_are_a_function_of_the_segment_seed_alone() -> None:
    alone = draw(rows([[(0, 300, 7)]], 300), BOTH)
    packed = draw(rows([[(0, 80, 1), (100, 300, 7)], [(40, 200, 2)]], 800), BOTH)
    assert torch.equal(packed[0, 25:100], alone[0])
    assert not torch.equal(draw(rows([[(0, 300, 8)]], 300), BOTH), alone)
    assert not packed[0, 20:25].any() and not packed[0, 100:].any() and not packed[1, :10].any()


def test_the_expected_share_is_that_of_spans_that_start_anywhere() -> None:
    """Of 40 frames 0.5 * 40 / 10 = 2 spans of 10: their mean union has 20 - E[overlap] frames."""
    segments = rows([[(0, 160, seed)] for seed in range(4000)], 160)
    masked = draw(segments, HiddenMaskSettings(time_prob=0.5, time_length=10))[:, :, 0]
    starts = torch.arange(31)
    overlap = (10 - (starts[:, None] - starts).abs()).clamp(min=0).double().mean()
    assert float(masked.sum(dim=1).double().mean()) == pytest.approx(20 - float(overlap), rel=0.01)
    assert masked[:, 0].any() and masked[:, -1].any()
    # The number of spans is rounded at random, so that small probabilities have an effect: 0.1 * 40 / 10 = 0.4 spans.
    rare = draw(segments, HiddenMaskSettings(time_prob=0.1, time_length=10))[:, :, 0].sum(dim=1)
    assert set(rare.tolist()) == {0, 10} and float((rare > 0).double().mean()) == pytest.approx(0.4, abs=0.03)


def test_bands_are_masked_in_all_frames_of_their_segment_and_in_no_other() -> None:
    masked = draw(rows([[(0, 80, 1), (84, 60, 2)]], 144), HiddenMaskSettings(channel_prob=0.5, channel_length=16))[0]
    for first, stop in ((0, 20), (21, 36)):
        assert torch.equal(masked[first:stop], masked[first : first + 1].expand(stop - first, -1))
        assert 16 <= int(masked[first].sum()) <= 64
    assert not torch.equal(masked[0], masked[21]) and not masked[20].any()


def test_a_mask_covers_at_most_half_of_a_short_segment_per_span() -> None:
    masked = draw(rows([[(0, 24, seed)] for seed in range(300)], 24), HiddenMaskSettings(time_prob=0.1))[:, :, 0]
    assert int(masked.sum(dim=1).max()) == 3
    assert not draw(rows([[(0, 4, 1)]], 8), HiddenMaskSettings(time_prob=1.0)).any()


def test_masked_outputs_of_the_subsampling_have_no_effect_and_the_others_do() -> None:
    torch.manual_seed(0)
    encoder = ConformerEncoder(ENCODER).eval()
    segments = rows([[(0, 90, 3)]], 90)
    log_mel = torch.randn(1, 90, 8)
    layout = encoder.layout(segments)
    everything = torch.ones(1, 23, 128, dtype=torch.bool)
    outputs = [encoder(x, layout, masked=everything) for x in (log_mel, torch.randn(1, 90, 8))]
    assert torch.equal(outputs[0], outputs[1])
    masked = draw(segments, BOTH)
    seen = []
    encoder.subsampling.register_forward_hook(lambda _, __, y: seen.append(y))
    encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(log_mel, layout, masked=masked)
    assert torch.equal(seen[1][:, :23], seen[0][:, :23].masked_fill(masked, 0.0)) and masked.any()


def test_masks_have_the_width_of_the_first_stage_and_none_are_drawn_by_default() -> None:
    stages = replace(ENCODER, earlier_stages=[StageSettings(1, 64, 2, 16)])
    assert draw(rows([[(0, 80, 1)]], 80), BOTH, stages).shape == (1, 20, 64)
    assert draw_hidden_masks(rows([[(0, 80, 1)]], 80), ENCODER, HiddenMaskSettings(), CPU) is None
