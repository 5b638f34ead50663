"""Encoder frame t depends mostly on the mel frames of BEST-RQ target t."""

import pytest
import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from common.segments import Segments

MELS = 16


def make_encoder(seed: int) -> ConformerEncoder:
    torch.manual_seed(seed)
    settings = EncoderSettings(
        num_mels=MELS, dim=32, num_layers=1, num_heads=2, feedforward_dim=32, subsampling_channels=32
    )
    return ConformerEncoder(settings).double().eval()


def subsample(encoder: ConformerEncoder, log_mel: Tensor, start: int, length: int) -> Tensor:
    layout = encoder.layout(Segments(torch.tensor([[start]]), torch.tensor([[length]]), log_mel.shape[0]))
    first = start // 4
    return encoder.subsampling(log_mel[None], layout)[0, first : first + -(-length // 4)]


@pytest.mark.parametrize("start", [0, 12])
@pytest.mark.parametrize("length", [40, 41, 42, 43])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_impulse_in_the_frames_of_target_t_changes_encoder_frame_t_most(seed: int, length: int, start: int) -> None:
    encoder = make_encoder(seed)
    clean = torch.randn(72, MELS, dtype=torch.float64)
    before = subsample(encoder, clean, start, length)
    for t in range(length // 4):
        changed = clean.clone()
        changed[start + 4 * t : start + 4 * t + 4] += 1.0
        moved = (subsample(encoder, changed, start, length) - before).norm(dim=-1)
        assert moved.argmax() == t
        outside = torch.ones(len(moved), dtype=torch.bool)
        outside[max(0, t - 1) : t + 2] = False
        assert moved[outside].abs().max() == 0


@pytest.mark.parametrize("length", [40, 41, 42, 43])
def test_receptive_field_is_two_frames_before_and_one_after_its_target(length: int) -> None:
    encoder = make_encoder(0)
    log_mel = torch.randn(60, MELS, dtype=torch.float64, requires_grad=True)
    frames = subsample(encoder, log_mel, 8, length)
    for t, frame in enumerate(frames):
        (grad,) = torch.autograd.grad(frame.pow(2).sum(), log_mel, retain_graph=True)
        frames_used = grad.abs().sum(dim=1).nonzero().flatten().tolist()
        first, last = max(8 + 4 * t - 2, 8), min(8 + 4 * t + 4, 8 + length - 1)
        assert frames_used == list(range(first, last + 1))
