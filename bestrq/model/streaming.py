"""Streaming encoder: chunk by chunk, with cached state, equal to one pass over the entire segment.

Needs mask 'chunk', causal convolutions and evaluation mode. The state is bounded (unless `left_chunks` is -1), and so
are time and memory per chunk, for streams of any length.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bestrq.model.attention.heads import split_heads
from bestrq.model.attention.module import SelfAttention
from bestrq.model.conformer import ConformerBlock, ConformerEncoder
from bestrq.model.convolution import ConvolutionModule, depthwise
from bestrq.model.positions import rotary_phase
from common.errors import UserError
from common.segments import Segments


@dataclass
class StreamState:
    """State of a stream between two chunks."""

    num_frames: int
    """encoder frames so far"""
    log_mel: Tensor
    """[1, stride, M]: last mel frames"""
    attention: list[tuple[Tensor, Tensor]]
    """per block, rotated keys and values [1, KV, m, d] of the earlier frames that the next chunk attends to"""
    convolution: list[Tensor]
    """per block, [1, K - 1, D]: last inputs of the depthwise convolution"""


def start_stream(encoder: ConformerEncoder) -> StreamState:
    """State before the first chunk.

    Raises:
        UserError: a setting does not support streaming.
        ValueError: the encoder is in training mode.
    """
    settings, parameter = encoder.settings, next(encoder.parameters())
    required = {"mask": "chunk", "causal_convolution": True, "earlier_stages": [], "group_size": 1}
    for name, value in required.items():
        if getattr(settings, name) != value:
            raise UserError(f"encoder.{name} is {getattr(settings, name)!r}: streaming needs {value!r}")
    if encoder.training:
        raise ValueError("the encoder is in training mode: call encoder.eval() before streaming")
    heads = settings.num_kv_heads or settings.num_heads
    empty = parameter.new_zeros(1, heads, 0, settings.head_dim)
    return StreamState(
        num_frames=0,
        log_mel=parameter.new_zeros(1, settings.stride, settings.num_mels),
        attention=[(empty, empty)] * settings.num_layers,
        convolution=[parameter.new_zeros(1, settings.kernel_size - 1, settings.dim)] * settings.num_layers,
    )


@torch.no_grad()
def encode_chunk(encoder: ConformerEncoder, log_mel: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """Encode the next chunk of log-mel `[F, M]`. Return encoder frames `[T, D]` and the new state.

    F is `chunk_size * stride` mel frames; the last chunk may be shorter.

    Raises:
        ValueError: the chunk is longer, or follows a shorter chunk.
    """
    settings = encoder.settings
    full = settings.chunk_size * settings.stride
    if not 0 < len(log_mel) <= full or state.num_frames % settings.chunk_size:
        raise ValueError(f"a chunk of {len(log_mel)} mel frames: give {full}, or fewer in the last chunk only")
    rows = torch.cat((state.log_mel, log_mel[None].to(state.log_mel)), dim=1)
    x = _subsample(encoder, rows, is_first=state.num_frames == 0)
    position = state.num_frames + torch.arange(x.shape[1], device=x.device)[None]
    if encoder.fourier is not None:
        x = x + encoder.fourier(position)
    phase = None
    if settings.position == "rotary":
        scaled = position.double() / settings.rotary_interpolation
        phase = rotary_phase(scaled, settings.head_dim, settings.rotary_theta, x.dtype)
    keep = None if settings.left_chunks < 0 else settings.left_chunks * settings.chunk_size
    new_state = StreamState(state.num_frames + x.shape[1], rows[:, -settings.stride :], [], [])
    total = x.new_zeros(())
    blocks = zip(encoder.blocks, state.attention, state.convolution, strict=True)
    for number, (block, keys_values, inputs) in enumerate(blocks):
        assert isinstance(block, ConformerBlock)

        def attend(y: Tensor, block: ConformerBlock = block, cache: tuple[Tensor, Tensor] = keys_values) -> Tensor:
            y, cache = stream_attention(block.attention, y, phase, cache, keep)
            new_state.attention.append(cache)
            return y

        def convolve(y: Tensor, block: ConformerBlock = block, cache: Tensor = inputs) -> Tensor:
            y, cache = stream_convolution(block.convolution, y, cache)
            new_state.convolution.append(cache)
            return y

        x = block.apply_modules(x, attend, convolve)
        if encoder.layer_sum is not None:
            total = total + encoder.layer_sum(x, number)
    return (x if encoder.layer_sum is None else total)[0], new_state


def stream_attention(
    module: SelfAttention, x: Tensor, phase: Tensor | None, cache: tuple[Tensor, Tensor], keep: int | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of a chunk `[R, n, D]` to itself and the cached frames. Return `[R, n, D]` and the new cache.

    Args:
        phase: `[R, n, d / 2, 2]` of `rotary_phase`, positions from the start of the stream, or None.
        cache: rotated keys and values `[R, KV, m, d]` of earlier frames.
        keep: frames in the new cache; None for all.
    """
    qkv = module.qkv(x).unflatten(-1, (module.num_heads + 2 * module.num_kv_heads, -1))
    q, k, v = split_heads(qkv, module.num_heads, phase)
    k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
    bias = None
    if module.relative_bias is not None:
        table = module.relative_bias()
        reach = table.shape[1] // 2
        frame = torch.arange(k.shape[2], device=k.device)
        distance = frame - frame[-x.shape[1] :, None]
        bias = table[:, distance.clamp(-reach, reach) + reach].to(q.dtype)
    attended = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=module.num_heads != module.num_kv_heads)
    first = 0 if keep is None else max(0, k.shape[2] - keep)
    return module.out(attended.transpose(1, 2).flatten(2)), (k[:, :, first:], v[:, :, first:])


def stream_convolution(module: ConvolutionModule, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve the next frames of one segment per row by a causal module of stride 1, in evaluation mode.

    Args:
        x: `[R, n, D]`, n >= 1.
        cache: `[R, K - 1, D]`, last inputs of the depthwise convolution: zeros at the start of a segment, then the
            cache returned by the previous call.

    Returns:
        The outputs of `forward` at these frames, `[R, n, D]`, and the cache for the next call.
    """
    assert module.causal and module.stride == 1 and module.depthwise.bias is not None
    inputs = torch.cat([cache, F.glu(module.pointwise_in(x), dim=-1)], dim=1)
    weight, bias = module.depthwise.weight.to(inputs.dtype), module.depthwise.bias.to(inputs.dtype)
    y = module.finish(depthwise(inputs, weight, bias, 0), x.new_ones(x.shape[:2], dtype=torch.bool))
    return y, inputs[:, x.shape[1] :]


def _subsample(encoder: ConformerEncoder, rows: Tensor, is_first: bool) -> Tensor:
    """Subsample mel frames `[1, stride + F, M]`, the first `stride` from the previous chunk, to `[1, T, D]`.

    A causal output depends only on the mel frames of its own target and of the previous one. Therefore the last output
    of the previous chunk is computed again and discarded. The first chunk follows a gap.
    """
    stride = encoder.settings.stride
    start = stride if is_first else 0
    layout = encoder.layout(Segments(torch.tensor([[start]]), torch.tensor([[rows.shape[1] - start]]), rows.shape[1]))
    padding = layout.valid_mel.shape[1] - rows.shape[1]
    return encoder.subsampling(F.pad(rows, (0, 0, 0, padding)), layout)[:, 1:]
