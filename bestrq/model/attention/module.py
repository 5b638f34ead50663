"""Multi-head self-attention within the segments of packed rows."""

from typing import Any

from torch import Tensor, nn

from bestrq.model.layout import StageLayout
from bestrq.model.settings import EncoderSettings


def attend_segments(*inputs: Any) -> Tensor:
    """A loop over segments, for the CPU. The module of every backend is imported on first use."""
    from bestrq.model.cpu.attention import attend_in_segments

    return attend_in_segments(*inputs)


def attend_all_pairs(*inputs: Any) -> Tensor:
    """`scaled_dot_product_attention`."""
    from bestrq.model.attention.dense import attend_dense

    return attend_dense(*inputs)


def attend_windows(*inputs: Any) -> Tensor:
    """The same by bands."""
    from bestrq.model.attention.bands import attend_bands

    return attend_bands(*inputs)


def attend_blocks(*inputs: Any) -> Tensor:
    """Compiled FlexAttention."""
    from bestrq.model.attention.flex import attend_flex

    return attend_flex(*inputs)


def attend_sequences(*inputs: Any) -> Tensor:
    """Flash attention by segment."""
    from bestrq.model.attention.varlen import attend_varlen

    return attend_varlen(*inputs)


ATTEND = {
    "segments": attend_segments,
    "dense": attend_all_pairs,
    "bands": attend_windows,
    "flex": attend_blocks,
    "varlen": attend_sequences,
}
"""attention of each backend (see `attention.backends`): `(qkv, num_heads, layout, bias, dropout)`, as `attend_dense`"""


class SelfAttention(nn.Module):
    """Attention of every frame to the frames of its segment that the mask allows, `[R, T, D] -> [R, T, D]`.

    With `group_size` g above 1, g neighbouring frames are concatenated before attention and split again after it:
    1 / g of the frames at g times the width (grouped attention, Burchi and Vielzeuf, arXiv 2109.01163, section 3.2).
    With `num_kv_heads` below `num_heads`, heads share keys and values (Ainslie et al., arXiv 2305.13245).
    """

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.num_heads = settings.num_heads
        self.num_kv_heads = settings.num_kv_heads or settings.num_heads
        self.group_size = settings.group_size
        self.attention_dropout = settings.attention_dropout
        head_dim = settings.dim // settings.num_heads
        self.qkv = nn.Linear(settings.dim, (self.num_heads + 2 * self.num_kv_heads) * head_dim)
        self.out = nn.Linear(settings.dim, settings.dim)
        self.relative_bias: nn.Module | None = None
        if settings.position == "relative":
            from bestrq.model.learned_positions import RelativeBias

            reach = settings.relative_buckets, settings.relative_max_distance
            self.relative_bias = RelativeBias(settings.num_heads, *reach)

    def forward(self, x: Tensor, layout: StageLayout) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (self.num_heads + 2 * self.num_kv_heads, -1))
        if self.group_size > 1:  # the last group of a segment may include padding frames
            qkv = group_frames(qkv * layout.valid[..., None, None].to(qkv.dtype), self.group_size)
        bias = None if self.relative_bias is None else self.relative_bias()
        dropout = self.attention_dropout if self.training else 0.0
        attended = ATTEND[layout.attention.backend](qkv, self.num_heads, layout.attention, bias, dropout)
        if self.group_size > 1:
            attended = ungroup_frames(attended, self.group_size)
        return self.out(attended.flatten(2))


def group_frames(x: Tensor, group_size: int) -> Tensor:
    """Concatenate neighbouring frames, `[R, T, H, d] -> [R, T / g, H, g * d]`."""
    return x.unflatten(1, (-1, group_size)).transpose(2, 3).flatten(3)


def ungroup_frames(x: Tensor, group_size: int) -> Tensor:
    """Inverse of `group_frames`."""
    return x.unflatten(3, (group_size, -1)).transpose(2, 3).flatten(1, 2)
