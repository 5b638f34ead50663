"""The objective's promises: targets aligned with encoder frames, no leak, and independence of packing; in float64."""

import pytest
import torch

from bestrq.model.conformer import EncoderSettings
from bestrq.pretraining.masking import fill_with_noise
from bestrq.pretraining.objective import BestRQ, mask_rows, target_frame_mask
from bestrq.pretraining.quantizer import QuantizerSettings, RandomProjectionQuantizer
from common.segments import Segments

FACTOR = 4
ENCODER = EncoderSettings(
    num_mels=12,
    dim=16,
    num_layers=2,
    num_heads=2,
    feedforward_dim=24,
    kernel_size=5,
    subsampling_channels=6,
    dropout=0.0,
    attention_dropout=0.0,
)
QUANTIZER = QuantizerSettings(num_codebooks=2, codebook_size=64)


def make_model() -> BestRQ:
    torch.manual_seed(0)
    return BestRQ(ENCODER, QUANTIZER).double()


def make_quantizer() -> RandomProjectionQuantizer:
    return RandomProjectionQuantizer(QUANTIZER, FACTOR * ENCODER.num_mels).double()


def random_mel(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_segment(length: int, num_frames: int) -> Segments:
    return Segments(torch.tensor([[0]]), torch.tensor([[length]]), num_frames, torch.tensor([[99]]))


@pytest.mark.parametrize("length", [16, 17, 18, 19])
def test_an_impulse_in_the_frames_of_target_t_changes_target_t_and_no_other(length):
    quantizer = make_quantizer()
    frames = 20
    log_mel = random_mel(1, frames, ENCODER.num_mels)
    everything = torch.arange(frames).unsqueeze(0) < length
    arguments = (everything, one_segment(length, frames), quantizer, FACTOR, 0.1)
    before = mask_rows(log_mel, *arguments)
    assert before.target_frames.tolist() == list(range(length // FACTOR)), "only complete stacks have a target"
    for t in range(length // FACTOR):
        changed = log_mel.clone()
        changed[0, t * FACTOR : (t + 1) * FACTOR] = 10 * random_mel(FACTOR, ENCODER.num_mels, seed=t + 1)
        after = mask_rows(changed, *arguments)
        differs = (after.targets != before.targets).any(dim=1)
        assert differs.nonzero().flatten().tolist() == [t]


def test_no_leak_with_everything_masked_the_input_cannot_reach_the_output():
    model = make_model()
    segments = Segments(torch.tensor([[0, 24]]), torch.tensor([[19, 30]]), 60, torch.tensor([[1, 2]]))
    mask = torch.zeros(1, 60, dtype=torch.bool)
    mask[0, :19] = mask[0, 24:54] = True
    outputs = []
    for seed in (0, 1):
        clean = random_mel(1, 60, ENCODER.num_mels, seed=seed)
        noisy = fill_with_noise(clean, mask, segments, 0.1)
        outputs.append(model.encoder(noisy, model.encoder.layout(segments)))
    assert torch.equal(*outputs)


def test_no_leak_of_masked_frames_beside_unmasked_ones():
    """Changing masked frames only (their targets change with them) leaves the loss input of the model untouched."""
    quantizer = make_quantizer()
    mask = torch.zeros(1, 60, dtype=torch.bool)
    mask[0, 12:33] = True
    clean = random_mel(1, 60, ENCODER.num_mels)
    other = torch.where(mask.unsqueeze(-1), random_mel(1, 60, ENCODER.num_mels, seed=5), clean)
    first, second = (mask_rows(x, mask, one_segment(58, 60), quantizer, FACTOR, 0.1) for x in (clean, other))
    assert torch.equal(first.log_mel, second.log_mel)
    assert not torch.equal(first.targets, second.targets)
    assert first.target_frames.tolist() == [3, 4, 5, 6, 7], "frames 32 is masked, 33 to 35 are not: no target 8"


def test_gaps_and_incomplete_stacks_have_no_target():
    mask = torch.ones(1, 40, dtype=torch.bool)
    inside = target_frame_mask(mask, Segments(torch.tensor([[0, 16]]), torch.tensor([[10, 19]]), 40), FACTOR)
    assert inside[0].nonzero().flatten().tolist() == [0, 1, 4, 5, 6, 7]


def loss_and_gradients(model: BestRQ, rows: list[tuple]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    quantizer = make_quantizer()
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for log_mel, mask, segments in rows:
        masked = mask_rows(log_mel, mask, segments, quantizer, FACTOR, 0.1)
        loss_sum, _ = model(masked.log_mel, masked.segments, masked.target_frames, masked.targets)
        total = total + loss_sum
    total.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return total.detach(), gradients


def test_loss_and_gradients_do_not_depend_on_packing():
    """Three utterances alone = padded = packed into one row with garbage in its gaps, to 1e-9 in float64."""
    model = make_model()
    lengths = [23, 41, 16]
    utterances = [random_mel(n, ENCODER.num_mels, seed=n) for n in lengths]
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.8 for n in lengths]

    def row(frames: int, members: list[tuple[int, int]]) -> tuple:
        log_mel = 50 * random_mel(1, frames, ENCODER.num_mels, seed=77)  # what stands in a gap must not matter
        mask = torch.zeros(1, frames, dtype=torch.bool)
        for index, start in members:
            log_mel[0, start : start + lengths[index]] = utterances[index]
            mask[0, start : start + lengths[index]] = masks[index]
        starts = torch.tensor([[start for _, start in members] + [0]])
        used = torch.tensor([[lengths[index] for index, _ in members] + [0]])
        seeds = torch.tensor([[1000 + index for index, _ in members] + [0]])
        return log_mel, mask, Segments(starts, used, frames, seeds)

    alone = loss_and_gradients(model, [row(-(-n // 4) * 4, [(i, 0)]) for i, n in enumerate(lengths)])
    padded = loss_and_gradients(model, [row(64, [(i, 4 * i)]) for i in range(3)])
    packed = loss_and_gradients(model, [row(96, [(1, 4), (2, 52), (0, 72)])])
    for loss, gradients in (padded, packed):
        torch.testing.assert_close(loss, alone[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients, alone[1], rtol=1e-9, atol=1e-9)


def test_rows_without_a_target_give_zero_loss_and_finite_gradients():
    loss, gradients = loss_and_gradients(
        make_model(), [(random_mel(1, 20, 12), torch.zeros(1, 20, dtype=torch.bool), one_segment(20, 20))]
    )
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
