"""An utterance's outputs, loss and gradients do not depend on its neighbours, its row, or the padding (float64)."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bestrq.model import attention
from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.layout import RowLayout, attention_mask

TOLERANCE = 1e-9
VARIANTS = {
    "rotary": {},
    "no positions": {"position": "none"},
    "kernel 31": {"kernel_size": 31},
    "kernel 1": {"kernel_size": 1},
}


def make_encoder(**changes: object) -> ConformerEncoder:
    settings = {"num_mels": 8, "dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 24, "kernel_size": 7}
    torch.manual_seed(3)
    encoder = ConformerEncoder(EncoderSettings(**{**settings, "subsampling_channels": 4, **changes}))  # type: ignore
    for parameter in encoder.parameters():  # no zero biases: what leaks through a bias must show
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.double().eval()


@dataclass
class Result:
    outputs: Tensor
    loss: Tensor
    input_grad: Tensor
    parameter_grads: list[Tensor]


def with_mask(layout: RowLayout) -> RowLayout:
    """The same layout as on CUDA, where one call with a mask takes the place of the loop over segments."""
    owner = torch.zeros_like(layout.valid, dtype=torch.int64)
    for row, (starts, lengths) in enumerate(zip(layout.segment_start, layout.segment_length, strict=True)):
        for slot, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            owner[row, start : start + length] = slot
    layout.attention_mask = attention_mask(layout.valid, owner, layout.segment_start.shape[1])
    return layout


def run(
    encoder: ConformerEncoder,
    utterance: Tensor,
    row: int,
    slots: list[tuple[int, int]],
    num_rows: int,
    frames: int,
    use_mask: bool = False,
) -> Result:
    """Encode `utterance` as the first of `slots` (start, length) in `row`; everything else, gaps included, is noise.

    The loss reads the utterance's frames only.
    """
    noise = torch.Generator().manual_seed(99)
    log_mel = torch.randn(num_rows, frames, 8, dtype=torch.float64, generator=noise) * 5
    start, length = slots[0]
    log_mel[row, start : start + length] = utterance
    log_mel.requires_grad_()
    segment_start, segment_length = (torch.zeros(num_rows, len(slots), dtype=torch.int64) for _ in range(2))
    for r in range(num_rows):  # the other rows hold the same segments in another order
        ordered = slots if r == row else slots[1:] + slots[:1]
        segment_start[r], segment_length[r] = torch.tensor(ordered).T
    layout = encoder.layout(segment_start, segment_length, frames)
    if use_mask:
        layout = with_mask(layout)
    outputs = encoder(log_mel, layout)[row, start // 4 : start // 4 + -(-length // 4)]
    weight = torch.randn(outputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    loss = (outputs * weight).sum()
    encoder.zero_grad()
    loss.backward()
    assert log_mel.grad is not None
    rest = log_mel.grad.clone()
    rest[row, start : start + length] = 0
    assert rest.abs().max() == 0, "the loss of one utterance depends on frames outside it"
    return Result(
        outputs.detach(),
        loss.detach(),
        log_mel.grad[row, start : start + length],
        [p.grad.clone() for p in encoder.parameters() if p.grad is not None],
    )


def assert_same(a: Result, b: Result) -> None:
    for x, y in zip(
        (a.outputs, a.loss, a.input_grad, *a.parameter_grads),
        (b.outputs, b.loss, b.input_grad, *b.parameter_grads),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("use_mask", [False, True], ids=["loop", "mask"])
@pytest.mark.parametrize("length", [37, 38, 39, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_utterance_alone_padded_and_packed_gives_the_same(variant: str, length: int, use_mask: bool) -> None:
    encoder = make_encoder(**VARIANTS[variant])
    utterance = torch.randn(length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gap = encoder.row_gap
    behind = -(-(44 + length + gap) // 4) * 4
    alone = run(encoder, utterance, 0, [(0, length)], 1, -(-length // 4) * 4, use_mask)
    padded = run(encoder, utterance, 0, [(0, length)], 1, 100, use_mask)
    packed = run(encoder, utterance, 1, [(44, length), (0, 40), (behind, 30), (0, 0)], 2, 132, use_mask)
    assert alone.outputs.abs().min() > 0 and all(grad.abs().max() > 0 for grad in alone.parameter_grads[:4])
    assert_same(alone, padded)
    assert_same(alone, packed)


def test_gaps_and_unused_rows_come_out_as_zeros() -> None:
    encoder = make_encoder()
    layout = encoder.layout(torch.tensor([[8], [0]]), torch.tensor([[21], [0]]), 48)
    outputs = encoder(torch.randn(2, 48, 8, dtype=torch.float64), layout)
    assert outputs[~layout.valid].abs().max() == 0
    assert outputs[layout.valid].abs().min() > 0 and int(layout.valid.sum()) == 6


def test_loop_and_mask_agree_over_whole_rows_forward_and_backward() -> None:
    torch.manual_seed(0)
    encoder = make_encoder()
    layout = encoder.layout(torch.tensor([[0, 40, 0], [60, 0, 0]]), torch.tensor([[33, 55, 0], [40, 52, 0]]), 100)
    qkv = torch.randn(2, 25, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    loop = attention.attend_in_segments(qkv, layout, 0.0)
    masked = attention.attend_with_mask(qkv, with_mask(layout), 0.0)
    where = layout.valid[..., None, None]
    weight = torch.randn(masked.shape, dtype=torch.float64) * where
    (loop_grad,) = torch.autograd.grad((loop * weight).sum(), qkv)
    (mask_grad,) = torch.autograd.grad((masked * weight).sum(), qkv)
    torch.testing.assert_close(loop, masked * where, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loop_grad, mask_grad, rtol=1e-12, atol=1e-12)


def test_rows_where_every_segment_shares_one_slot_mask_their_padding_only() -> None:
    valid = torch.tensor([[True, True, False], [False, False, False]])
    mask = attention_mask(valid, torch.zeros(2, 3, dtype=torch.int64), 1)
    assert mask.shape == (2, 1, 1, 3)
    assert mask[0, 0, 0].tolist() == [True, True, False] and mask[1].all()
