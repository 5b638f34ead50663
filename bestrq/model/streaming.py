"""Encoding sound as it arrives: chunk by chunk, with what earlier chunks left behind, the same as in one pass.

For encoders with mask 'chunk' and causal convolutions, in evaluation mode. What a chunk needs of the past is bounded
(unless `left_chunks` is -1), so is the time and memory that a chunk costs, however long the stream is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bestrq.model.conformer import ConformerBlock, ConformerEncoder
from bestrq.model.positions import rotary_phase
from common.errors import UserError
from common.segments import Segments


@dataclass
class StreamState:
    """What the next chunk needs of those before."""

    num_frames: int
    """encoder frames so far"""
    log_mel: Tensor
    """[1, stride, M]: the last mel frames"""
    attention: list[tuple[Tensor, Tensor]]
    """of each block, turned keys and values [1, KV, m, d] of the frames that the next chunk sees"""
    convolution: list[Tensor]
    """of each block, [1, K - 1, D]: the last inputs of the depthwise convolution"""


def start_stream(encoder: ConformerEncoder) -> StreamState:
    """The state before the first chunk.

    Raises:
        UserError: the encoder looks ahead, so it cannot stream; naming the setting.
    """
    settings, parameter = encoder.settings, next(encoder.parameters())
    wanted = {"mask": "chunk", "causal_convolution": True, "earlier_stages": [], "group_size": 1}
    for name, value in wanted.items():
        if getattr(settings, name) != value:
            raise UserError(f"encoder.{name} is {getattr(settings, name)!r}: streaming needs {value!r}")
    if encoder.training:
        raise ValueError("the encoder is in training mode: put it into evaluation mode before streaming")
    heads = settings.num_kv_heads or settings.num_heads
    nothing = parameter.new_zeros(1, heads, 0, settings.head_dim)
    return StreamState(
        num_frames=0,
        log_mel=parameter.new_zeros(1, settings.stride, settings.num_mels),
        attention=[(nothing, nothing)] * settings.num_layers,
        convolution=[parameter.new_zeros(1, settings.kernel_size - 1, settings.dim)] * settings.num_layers,
    )


@torch.no_grad()
def encode_chunk(encoder: ConformerEncoder, log_mel: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
    """Encoder frames `[T, D]` of the next chunk of log-mel `[F, M]`, and the state behind it.

    F is `chunk_size * stride` mel frames; the last chunk may be shorter.

    Raises:
        ValueError: a chunk is longer, or follows one that was shorter.
    """
    settings = encoder.settings
    whole = settings.chunk_size * settings.stride
    if not 0 < len(log_mel) <= whole or state.num_frames % settings.chunk_size:
        raise ValueError(f"a chunk of {len(log_mel)} mel frames: give {whole}, and fewer in the last chunk only")
    rows = torch.cat((state.log_mel, log_mel[None].to(state.log_mel)), dim=1)
    x = _subsample(encoder, rows, is_first=state.num_frames == 0)
    position = state.num_frames + torch.arange(x.shape[1], device=x.device)[None]
    if encoder.fourier is not None:
        x = x + encoder.fourier(position)
    phase = None
    if settings.position == "rotary":
        scaled = position.cpu().double() / settings.rotary_interpolation
        phase = rotary_phase(scaled, settings.head_dim, settings.rotary_theta, x.dtype).to(x.device)
    keep = None if settings.left_chunks < 0 else settings.left_chunks * settings.chunk_size
    after = StreamState(state.num_frames + x.shape[1], rows[:, -settings.stride :], [], [])
    for block, keys_values, inputs in zip(encoder.blocks, state.attention, state.convolution, strict=True):
        assert isinstance(block, ConformerBlock)

        def attend(y: Tensor, block: ConformerBlock = block, cache: tuple[Tensor, Tensor] = keys_values) -> Tensor:
            y, cache = block.attention.stream(y, phase, cache, keep)
            after.attention.append(cache)
            return y

        def convolve(y: Tensor, block: ConformerBlock = block, cache: Tensor = inputs) -> Tensor:
            y, cache = block.convolution.stream(y, cache)
            after.convolution.append(cache)
            return y

        x = block.apply_modules(x, attend, convolve)
    return x[0], after


def _subsample(encoder: ConformerEncoder, rows: Tensor, is_first: bool) -> Tensor:
    """Encoder frames `[1, T, D]` of mel frames `[1, stride + F, M]`, of which the first belong to the chunk before.

    A causal output looks back into the one before it and no further, so that one is made again and thrown away. Before
    the first chunk lies a gap.
    """
    stride = encoder.settings.stride
    start = stride if is_first else 0
    layout = encoder.layout(Segments(torch.tensor([[start]]), torch.tensor([[rows.shape[1] - start]]), rows.shape[1]))
    padding = layout.valid_mel.shape[1] - rows.shape[1]
    return encoder.subsampling(torch.nn.functional.pad(rows, (0, 0, 0, padding)), layout)[:, 1:]
