"""An utterance's outputs, loss and gradients do not depend on its neighbours, its row, or the padding (float64)."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder, EncoderSettings

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


def run(
    encoder: ConformerEncoder,
    utterance: Tensor,
    row: int,
    slots: list[tuple[int, int]],
    num_rows: int,
    frames: int,
    backend: str = "segments",
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
    layout = encoder.layout(segment_start, segment_length, frames, backend)
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


@pytest.mark.parametrize("backend", ["segments", "dense"])
@pytest.mark.parametrize("length", [37, 38, 39, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_utterance_alone_padded_and_packed_gives_the_same(variant: str, length: int, backend: str) -> None:
    encoder = make_encoder(**VARIANTS[variant])
    utterance = torch.randn(length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gap = encoder.settings.row_gap
    behind = -(-(44 + length + gap) // 4) * 4
    alone = run(encoder, utterance, 0, [(0, length)], 1, -(-length // 4) * 4, backend)
    padded = run(encoder, utterance, 0, [(0, length)], 1, 100, backend)
    packed = run(encoder, utterance, 1, [(44, length), (0, 40), (behind, 30), (0, 0)], 2, 132, backend)
    assert alone.outputs.abs().min() > 0 and all(grad.abs().max() > 0 for grad in alone.parameter_grads[:4])
    assert_same(alone, padded)
    assert_same(alone, packed)


def test_gaps_and_unused_rows_come_out_as_zeros() -> None:
    encoder = make_encoder()
    layout = encoder.layout(torch.tensor([[8], [0]]), torch.tensor([[21], [0]]), 48)
    outputs = encoder(torch.randn(2, 48, 8, dtype=torch.float64), layout)
    assert outputs[~layout.output.valid].abs().max() == 0
    assert outputs[layout.output.valid].abs().min() > 0 and int(layout.output.valid.sum()) == 6
