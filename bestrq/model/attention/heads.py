"""Heads of attention: splitting and rotation of queries, keys and values; relative bias."""

import torch
from torch import Tensor


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Rotate neighbouring pairs of `[..., head_dim]` by phases that broadcast against `[..., head_dim / 2, 2]`.

    Computed and returned in the precision of the phases, as bfloat16 would round every angle.
    """
    pairs = x.to(phase.dtype).unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a ninth of the time of real products there
        return rotate_complex(pairs, torch.view_as_complex(phase))
    (even, odd), (cosine, sine) = pairs.unbind(-1), phase.unbind(-1)
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


def rotate_complex(pairs: Tensor, phase: Tensor) -> Tensor:
    """Rotate `[..., head_dim / 2, 2]` by complex phases `[..., head_dim / 2]`, to `[..., head_dim]`."""
    return torch.view_as_real(torch.view_as_complex(pairs) * phase).flatten(-2)


def split_heads(qkv: Tensor, num_heads: int, phase: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split `[R, T, H + 2 * KV, d]` into rotated queries `[R, H, T, d]`, rotated keys and values `[R, KV, T, d]`.

    Args:
        phase: `[R, T, d / 2, 2]` of `rotary_phase`; None for no rotation.
    """
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    qk, v = qkv[:, :, : num_heads + num_kv_heads], qkv[:, :, num_heads + num_kv_heads :]
    if phase is not None:
        qk = rotate(qk, phase[:, :, None]).to(v.dtype)
    q, k = qk.split((num_heads, num_kv_heads), dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def add_bias(mask: Tensor, bias: Tensor, distance: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `[..., H, queries, keys]`: the bias at each distance, minus infinity at masked keys."""
    reach = bias.shape[1] // 2
    scores = bias[:, distance.clamp(-reach, reach) + reach].to(dtype)
    return torch.where(mask, scores, torch.tensor(-torch.inf, dtype=dtype, device=scores.device))
