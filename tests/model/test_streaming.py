"""Streaming encoder: chunks with cached state equal one pass (float64)."""

import pytest
import torch

from bestrq.model.conformer import ConformerEncoder, EncoderSettings
from bestrq.model.streaming import encode_chunk, start_stream
from common.errors import UserError
from common.segments import Segments


def make_encoder(**changes: object) -> ConformerEncoder:
    torch.manual_seed(0)
    values = {
        "num_mels": 16, "dim": 32, "num_layers": 2, "num_heads": 4, "feedforward_dim": 48, "kernel_size": 7,
        "subsampling_channels": 4, "relative_max_distance": 10, "relative_buckets": 16, "mask": "chunk",
        "chunk_size": 4, "left_chunks": 2, "causal_convolution": True, **changes,
    }  # fmt: skip
    encoder = ConformerEncoder(EncoderSettings(**values)).double().eval()  # type: ignore[arg-type]
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.mark.parametrize("num_kv_heads", [0, 2])
@pytest.mark.parametrize("subsampling", [("convolutional", 4), ("striding", 8), ("stacking", 2)], ids=lambda s: s[0])
@pytest.mark.parametrize("left_chunks", [0, 2, -1])
@pytest.mark.parametrize("position", ["rotary", "relative", "fourier", "none"])
def test_chunks_with_caches_equal_one_pass(
    position: str, left_chunks: int, subsampling: tuple[str, int], num_kv_heads: int
) -> None:
    name, stride = subsampling
    encoder = make_encoder(
        position=position, left_chunks=left_chunks, subsampling=name, subsampling_factor=stride,
        num_kv_heads=num_kv_heads,
    )  # fmt: skip
    chunk = 4 * stride
    frames = 5 * chunk + stride + 1
    log_mel = torch.randn(frames, 16, dtype=torch.float64)
    layout = encoder.layout(Segments(torch.tensor([[0]]), torch.tensor([[frames]]), frames))
    whole = encoder(log_mel[None], layout)[0]
    state, outputs = start_stream(encoder), []
    for first in range(0, frames, chunk):
        output, state = encode_chunk(encoder, log_mel[first : first + chunk], state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-11, atol=1e-11)
    assert state.num_frames == len(whole) and whole.abs().min() > 0


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "batch_norm"])
def test_a_stream_with_any_norm_and_a_gated_feed_forward_equals_one_pass(norm: str) -> None:
    encoder = make_encoder(
        convolution_norm=norm, feedforward="swiglu", norm="rms_norm" if norm == "rms_norm" else "layer_norm"
    )
    log_mel = torch.randn(48, 16, dtype=torch.float64)
    whole = encoder(log_mel[None], encoder.layout(Segments(torch.tensor([[0]]), torch.tensor([[48]]), 48)))[0]
    state, outputs = start_stream(encoder), []
    for chunk in log_mel.split(16):
        output, state = encode_chunk(encoder, chunk, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole, rtol=1e-11, atol=1e-11)


def test_the_state_of_a_stream_does_not_grow() -> None:
    encoder, sizes = make_encoder(), []
    state = start_stream(encoder)
    for _ in range(6):
        _, state = encode_chunk(encoder, torch.randn(16, 16, dtype=torch.float64), state)
        tensors = [*state.convolution, state.log_mel, *(t for pair in state.attention for t in pair)]
        sizes.append(sum(tensor.numel() for tensor in tensors))
    assert sizes[0] < sizes[1] == sizes[2] == sizes[5]


@pytest.mark.parametrize(
    "changes, field", [({"mask": "window"}, "mask"), ({"causal_convolution": False}, "causal_convolution")]
)
def test_an_encoder_with_look_ahead_is_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(UserError, match=f"encoder.{field}"):
        start_stream(make_encoder(**changes))


def test_a_chunk_of_another_size_is_refused_unless_it_is_the_last() -> None:
    encoder = make_encoder()
    log_mel = torch.randn(17, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="give 16"):
        encode_chunk(encoder, log_mel, start_stream(encoder))
    _, state = encode_chunk(encoder, log_mel[:5], start_stream(encoder))
    with pytest.raises(ValueError, match="give 16"):
        encode_chunk(encoder, log_mel[:16], state)
