"""Weighted sum of layers: value and gradients by definition, frozen blocks, checkpointing, refused settings."""

import pytest
import torch
from torch import Tensor

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.settings import StageSettings
from bestrq.model.streaming import encode_chunk, start_stream
from common.errors import UserError
from common.segments import Segments
from tests.variants import Segment, encode, make_encoder, utterance

SUM = {"output": "weighted_sum", "num_layers": 3}
ROW = Segments(torch.tensor([[0]]), torch.tensor([[48]]), 48)


def layer_outputs(encoder: ConformerEncoder, log_mel: Tensor) -> list[Tensor]:
    """Output of every block."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, y: outputs.append(y)) for block in encoder.blocks]
    encoder(log_mel, encoder.layout(ROW))
    for hook in hooks:
        hook.remove()
    return outputs


def test_the_output_is_the_softmax_weighted_mean_of_normalised_block_outputs() -> None:
    encoder = make_encoder({}, **SUM)
    log_mel = utterance(1, 48)[None]
    outputs = layer_outputs(encoder, log_mel)
    weights = encoder.layer_sum.weight.exp() / encoder.layer_sum.weight.exp().sum()
    expected = torch.zeros(())
    for weight, y in zip(weights, outputs, strict=True):
        centred = y - y.mean(dim=-1, keepdim=True)
        expected = expected + weight * centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    actual = encoder(log_mel, encoder.layout(ROW))
    assert len(set(weights.tolist())) == 3
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    parameters = list(encoder.parameters())
    factor = torch.randn_like(actual)
    for a, b in zip(*(torch.autograd.grad((y * factor).sum(), parameters) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_weights_are_equal_at_first_and_an_encoder_without_the_sum_has_none() -> None:
    assert torch.equal(ConformerEncoder(EncoderSettings(**SUM)).layer_sum.weight, torch.zeros(3))
    assert not [name for name in ConformerEncoder(EncoderSettings()).state_dict() if "layer_sum" in name]


def test_frozen_blocks_still_train_their_weights() -> None:
    encoder = make_encoder({}, **SUM)
    log_mel = utterance(1, 48)[None]
    whole, frozen = (encoder(log_mel, encoder.layout(ROW), blocks) for blocks in (None, 3))
    assert torch.equal(whole, frozen)
    frozen.square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is not None] == [
        "layer_sum.weight"
    ]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_do_not_depend_on_activation_checkpointing(mode: str) -> None:
    grads = []
    for checkpointing in ("none", mode):
        encoder = make_encoder({}, **SUM, activation_checkpointing=checkpointing)
        encoder(utterance(1, 48)[None], encoder.layout(ROW)).square().sum().backward()
        grads.append([parameter.grad for parameter in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_stages_of_different_frame_rates_are_refused_with_the_fix() -> None:
    with pytest.raises(UserError, match=r"encoder.output: 'weighted_sum' is invalid: .* give 'last'"):
        EncoderSettings(output="weighted_sum", earlier_stages=[StageSettings()])


def test_outputs_and_gradients_of_a_segment_do_not_depend_on_its_neighbours() -> None:
    encoder = make_encoder({}, **SUM)
    alone = [encode(encoder, "segments", [Segment(0, 0, 40, n)], 1, 40) for n in (1, 2)]
    packed = encode(encoder, "segments", [Segment(0, 0, 40, 1), Segment(0, 44, 40, 2), Segment(1, 8, 30, None)], 2, 88)
    for number, single in enumerate(alone):
        torch.testing.assert_close(packed.outputs[number], single.outputs[0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(packed.input_grads[number], single.input_grads[0], rtol=1e-9, atol=1e-10)
    assert packed.outside_grad == 0


def test_a_stream_equals_one_pass() -> None:
    encoder = make_encoder({"mask": "chunk", "convolution": "causal"}, **SUM)
    log_mel = utterance(1, 96)
    layout = encoder.layout(Segments(torch.tensor([[0]]), torch.tensor([[96]]), 96))
    state, outputs = start_stream(encoder), []
    for chunk in log_mel.split(24):
        output, state = encode_chunk(encoder, chunk, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), encoder(log_mel[None], layout)[0], rtol=1e-11, atol=1e-11)
